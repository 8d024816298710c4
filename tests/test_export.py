"""What the tools around `vllm bench` find in an exported run and sweep."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from common.errors import ConfigError
from experiments import export
from tests.sample_runs import save_bench, save_compare, save_sweep

SERVE = """
    date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency
    duration completed failed total_input_tokens total_output_tokens
    request_throughput request_goodput output_throughput total_token_throughput
    max_output_tokens_per_s max_concurrent_requests rtfx
    input_lens output_lens ttfts itls start_times generated_texts errors latencies queue_times
    mean_ttft_ms median_ttft_ms std_ttft_ms p99_ttft_ms mean_tpot_ms median_tpot_ms std_tpot_ms p99_tpot_ms
    mean_itl_ms median_itl_ms std_itl_ms p99_itl_ms mean_e2el_ms median_e2el_ms std_e2el_ms p99_e2el_ms
"""
"""The keys of `vllm bench serve --save-result --save-detailed`, version 0.32."""


def test_a_run_has_every_key_of_vllm_bench_serve_and_its_own(tmp_path: Path) -> None:
    run = save_bench(tmp_path / "run")
    (file,) = export.export(run)
    assert file == run / "vllm" / "jax.json"
    result = json.loads(file.read_text())
    assert not set(SERVE.split()) - set(result)
    assert not set(json.loads((run / "results.json").read_text())) - {"num_prompts"} - set(result)
    assert (result["backend"], result["model_id"], result["date"]) == ("jax", "tiny-llama", "20261125-103800")
    assert (result["num_prompts"], result["request_rate"], result["burstiness"]) == (3, "inf", 1.0)


def test_what_is_told_of_each_request_agrees_with_the_figures(tmp_path: Path) -> None:
    (file,) = export.export(save_bench(tmp_path / "run"))
    result = json.loads(file.read_text())
    assert result["input_lens"] == [10, 11, 10] and result["output_lens"] == [3, 1, 1]
    assert result["ttfts"] == pytest.approx([0.2, 1.0, 2.25])
    assert result["itls"][0] == pytest.approx([0.2, 0.4]) and result["itls"][1:] == [[], []]
    assert result["latencies"] == pytest.approx([0.8, 1.0, 2.25])
    assert result["queue_times"] == pytest.approx([0.0, 0.25, 0.0])
    assert result["start_times"] == pytest.approx([0.0, 0.5, 1.5])  # the second block begins where the first ends
    assert 1e3 * sum(result["ttfts"]) / 3 == pytest.approx(result["mean_ttft_ms"])
    assert sum(result["output_lens"]) == result["total_output_tokens"]
    assert result["max_output_tokens_per_s"] == 3 and result["max_concurrent_requests"] == 2  # both in the first second


def test_a_comparison_has_a_file_for_each_engine(tmp_path: Path) -> None:
    files = export.export(save_compare(tmp_path / "run"))
    assert [json.loads(file.read_text())["backend"] for file in files] == ["jax", "torch"]
    assert {json.loads(file.read_text())["dtype"] for file in files} == {"bfloat16"}


def test_a_sweep_is_laid_out_as_vllm_bench_sweep_leaves_it(tmp_path: Path) -> None:
    folder = save_sweep(tmp_path)
    export.export(folder)
    runs = [run for path in folder.rglob("**/summary.json") for run in json.loads(path.read_text())]  # how it looks for them
    assert len(runs) == 1
    assert runs[0]["run_number"] == 0 and runs[0]["workload.request_rate"] is None and runs[0]["backend"] == "jax"
    assert "ttfts" not in runs[0] and len(json.loads((folder / "vllm/000-aa/run=0.json").read_text())["ttfts"]) == 3
    table = pd.DataFrame.from_records(runs)
    assert {"request_throughput", "p99_e2el_ms", "output_throughput", "max_concurrent_requests"} <= set(table.columns)
    assert len(pd.read_csv(folder / "vllm" / "summary.csv")) == 1


def test_a_run_without_requests_has_no_peak() -> None:
    assert export.peaks([]) == {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0}


def test_the_command_prints_its_files_and_refuses_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", str(save_bench(tmp_path / "run"))])
    export.main()
    assert capsys.readouterr().out == f"{tmp_path / 'run/vllm/jax.json'}\n"
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as end:
        export.main()
    assert end.value.code == 2 and "no folder" in capsys.readouterr().err


def test_a_run_that_lost_its_requests_is_refused(tmp_path: Path) -> None:
    run = save_bench(tmp_path / "run")
    (run / "requests.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"holds no requests\.jsonl"):
        export.export(run)
    (run / "requests.jsonl").write_text('{"engine": "jax", "bl')
    with pytest.raises(ConfigError, match=r"requests\.jsonl, line 1: expected a JSON object"):
        export.export(run)
