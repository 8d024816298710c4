"""`experiments.diverge`: from a run directory to a finding, in real processes; its sentences and its refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from common.errors import ConfigError
from experiments import diverge
from experiments.correctness.bisect_tensor import Finding
from experiments.diverge import labels_quoted, positional, print_finding, recorded_run, sentence, windows_of
from tests.history_backend import history, last_line
from tests.planted import LAYER, deep_model

__all__ = ["history"]
SMALL = "kernels:native,max_num_seqs:4,max_num_batched_tokens:64,max_model_len:128,threads:1"


def write_run(directory: Path, *overrides: str, command: str = "compare") -> Path:
    """The directory of a run, as far as it is read: its configuration."""
    directory.mkdir(parents=True)
    small = ("workload=fixed", "workload.num_requests=3", "workload.prompt_len=20", "workload.output_len=6", "dtype=float32")
    with initialize_config_module("configs", version_base="1.3"):
        config = compose(command, [*small, *overrides])
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    return directory


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["diverge", "--config-dir", "configs", *arguments])
    diverge.main()


def test_a_defect_in_a_third_backend_is_named_from_a_run_directory(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = history / "packages" / "wronginfer"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torchinfer\nfrom tests.planted import planted\nModelRunner = planted(torchinfer.ModelRunner, 'rope')\n"
    )
    (history / "configs" / "engine" / "wrong.yaml").write_text("defaults: [/engine_base@_here_, _self_]\nname: wrong\n")
    model = deep_model(history / "deep")
    run = write_run(history / "runs" / "a run", "model=path", f"model.name={model}")
    command(monkeypatch, str(run), f"engines=[{{name:torch,{SMALL}}},{{name:wrong,{SMALL}}}]")
    printed = capsys.readouterr().out
    result = last_line(printed)
    found = result["finding"]
    assert (found["step"], found["request"], found["position"], found["layer"], found["tensor"]) == (0, 0, 1, LAYER, "q")
    right, wrong = result["engines"]
    assert wrong.startswith("wrong-") and found["wrong"] == [wrong] and result["verdict"] == "defect"
    assert f"layer {LAYER}, q" in result["said"] and "defect" in printed
    ran = [mine["kernels_used"] for mine in result["computed_by"].values()]
    assert list(result["computed_by"]) == [right, wrong] and ran == ["native", "native"]
    by = f"in float32, {right} by native ({result['computed_by'][right]['kernel_arithmetic']}) kernels, {wrong} by native ("
    assert by in " ".join(printed.split()).partition("defect: ")[0]
    assert json.loads((run / "diverge-1.json").read_text()) == result
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "diverge-1.json",
        f"diverge-{right}.log",
        f"diverge-{wrong}.log",
    ]


def test_an_engine_that_shows_nothing_is_refused_by_name(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(history / "run", "model=tiny-llama")
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, str(run), "engines=[history,history]")
    assert exit.value.code == 2
    assert "history does not show its steps" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("made_by", "arguments", "said"),
    [
        ("compare", ["engines=[history]"], "two engines"),
        ("compare", ["engines=[history,histroy]"], "Did you mean 'history'?"),
        ("compare", ["engines=[history,history]", "output_len=0"], "output_len must be"),
        ("compare", ["engines=[history,history]", "dtype=float16"], "dtype must be"),
        ("compare", ["engins=[history,history]"], "engins"),
        ("bench", [], "a run of one engine"),
        ("bench", ["engines=[history,histroy]"], "Did you mean 'history'?"),
        ("", [], "no directory of a run"),
        (None, [], "Give a run directory: python -m experiments.diverge runs/2-compare-a"),
    ],
)
def test_a_mistake_is_told_in_one_message_with_exit_code_2(
    made_by: str | None,
    arguments: list[str],
    said: str,
    history: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("1-compare-b", "2-compare-a", "3-compare-c.partial", "4-bench-d"):
        (history / "runs" / name).mkdir(parents=True)
        (history / "runs" / name / "results.json").write_text("{}")
    run = write_run(history / "run", "model=tiny-llama", command=made_by) if made_by else history / "nothing"
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, *([] if made_by is None else [str(run)]), *arguments)
    assert exit.value.code == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and said in told[0]


def test_the_run_stands_anywhere_among_the_overrides(tmp_path: Path) -> None:
    odd = tmp_path / "a=b's \\run\\"
    odd.mkdir()
    assert positional(["--config-dir", "configs", "runs/one", "dtype=float32"]) == [
        "--config-dir",
        "configs",
        "run='runs/one'",
        "dtype=float32",
    ]
    (override,) = OverridesParser.create().parse_overrides(positional(["dtype=float32", str(odd)])[1:])
    assert (override.key_or_group, override.value()) == ("run", str(odd))
    assert positional(["--cfg", "job", "--resolve", "runs/one"]) == ["--cfg", "job", "--resolve", "run='runs/one'"]
    assert positional(["--config-dir=configs", "runs/one"]) == ["--config-dir=configs", "run='runs/one'"]
    assert positional(["run=x", "dtype=float32"]) == ["run=x", "dtype=float32"]


def test_a_label_with_an_equals_sign_needs_no_quotes() -> None:
    assert labels_quoted("engines=[jax,jax-kernels=framework]") == 'engines=[jax,"jax-kernels=framework"]'
    for taken in ('engines=[jax,"jax-kernels=framework"]', "engines=[{name:jax,max_num_seqs:4},torch]", "dtype=float32"):
        assert labels_quoted(taken) == taken


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", b"a: [", "while parsing a flow node"),
        ("config.yaml", b"seed: 0", "has no model"),
        ("config.yaml", b"\xff\xfe", "invalid start byte"),
        ("results.json", b'{"tokens', "Unterminated string"),
        ("results.json", b"{}", "names no engine"),
    ],
)
def test_a_run_of_which_a_file_is_broken_is_refused_by_that_file(
    name: str, content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", "model=tiny-llama")
    (run / name).write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["diverge", str(run), "dtype=bfloat16"])
    with pytest.raises(SystemExit) as exit:
        diverge.main()
    assert exit.value.code == 2
    told = capfd.readouterr().err
    assert told.startswith(f"error: {run} is no directory of a run") and name in told
    assert (told.count(said), told.count("\n")) == (1, 1)


def test_a_sweep_is_refused_with_one_of_its_jobs(tmp_path: Path) -> None:
    job = tmp_path / "jobs" / "000-abc"
    job.mkdir(parents=True)
    (job / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"is a sweep; give the directory of one of its jobs, such as {job}"):
        recorded_run(tmp_path, OmegaConf.create({"engines": None}))


CHOICE = {"step": 2, "request": 1, "position": 9, "tokens": (4, 5), "margin": 1e-7, "error": 1e-6}


def result(**fields: Any) -> Mapping[str, Any]:
    base = {"engines": ["jax", "torch"], "num_positions": 9, "num_steps": 4, "max_logit_error": 2e-6, "finding": None}
    ran = {
        "jax": {"kernels_used": "native", "kernel_arithmetic": "AMX"},
        "torch": {"kernels_used": "framework", "kernel_arithmetic": None},
    }
    base |= {"looked_into": 0, "dtype": "float32", "model": "any", "num_requests": 1, "num_tokens": 9, "computed_by": ran}
    base |= {"advice": "", "threshold": 1e-3, "looked_inside": False}
    return base | {"choices": [], "verdict": "equal"} | fields


def test_what_was_found_is_said_in_words() -> None:
    same = sentence(result())
    assert same.startswith("In float32 no difference above the threshold: 9 rows of logits in 4 steps, apart by at most")
    assert "below the threshold of 0.001, every choice alike. To look into the layers, add inside=true." in same
    assert "Equal bits leave nothing to look into" in sentence(result(max_logit_error=0.0, looked_inside=True))
    looked = sentence(result(looked_inside=True))
    assert "no tensor off by more than its inputs explain" in looked and "inside=true" not in looked
    found = {"step": 1, "request": 0, "position": 7, "layer": 3, "tensor": "q", "difference": 1e-4, "inside": True}
    found |= {"errors": {"jax": 1e-7, "torch": 1e-4}, "wrong": ["torch"]}
    small = sentence(result(verdict="suspicious", finding=found))
    assert (
        small.startswith("In float32 a difference below the threshold: 9 rows")
        and "layer 3, q. Relative errors from the float64 result of its own inputs: jax 1.0e-07, torch 1.0e-04." in small
    )
    assert "the same bits" in sentence(result(max_logit_error=0.0))
    tie = {"verdict": "tie", "choices": [CHOICE | {"justified": True}]}
    every = sentence(result(**tie, differing_choices=1, dtype="bfloat16"))
    assert every.startswith("In bfloat16 no defect: ") and "chose differently 1 time, each time at a tie" in every
    assert "The first is in step 2, request 1, position 9: jax took 4 and torch 5. No layer is to blame" in every
    some = sentence(result(**tie, differing_choices=7))
    assert some.startswith("In float32 no defect among the 1 judged of 7 choices: ")
    assert "chose differently 7 times, the first 1 of them at ties; the others were not judged" in some
    chosen = sentence(result(verdict="defect", choices=[CHOICE | {"justified": False}]))
    assert "step 2, request 1, position 9: jax took 4 and torch 5" in chosen
    noisy = sentence(result(max_logit_error=0.6, looked_into=2))
    assert "no difference" in noisy and "farther from float64 than rounding takes it" in noisy
    assert sentence(result(verdict="undecided", max_logit_error=0.6, looked_into=3)).startswith("In float32 undecided")


def test_a_run_whose_timed_tokens_part_in_another_dtype_says_where_to_look(tmp_path: Path) -> None:
    recorded = OmegaConf.create({"dtype": "bfloat16"})
    assert windows_of(recorded, tmp_path, "float32") == ""  # a run that was cut short
    (tmp_path / "results.json").write_text('{"engines": {}, "tokens_equal_share": 0.454}')
    said = windows_of(recorded, tmp_path, "float32")
    assert said.startswith("The run's windows were bfloat16, where 45.4 % of tokens") and said.endswith("add dtype=bfloat16.")
    assert windows_of(recorded, tmp_path, "bfloat16") == ""
    for share in ("1.0", "null"):
        (tmp_path / "results.json").write_text(f'{{"engines": {{}}, "tokens_equal_share": {share}}}')
        assert windows_of(recorded, tmp_path, "float32") == ""


@pytest.mark.parametrize(("judged", "cut"), [(5, False), (6, True)])
def test_a_table_that_is_cut_says_where_the_rest_is(judged: int, cut: bool, capsys: pytest.CaptureFixture[str]) -> None:
    print_finding(result(verdict="tie", choices=[CHOICE | {"justified": True}] * judged, said="…"), "diverge-3.json")
    printed = capsys.readouterr().out
    assert printed.count("tie │") == 5 and "judged ┃" in printed
    assert ("The first 5 of the 6 judged; all 6 are in diverge-3.json." in printed) is cut


def test_what_ran_stands_above_what_was_found_and_where_else_to_look_below(capsys: pytest.CaptureFixture[str]) -> None:
    print_finding(result(said="the finding", advice="look elsewhere"), "diverge-3.json")
    assert capsys.readouterr().out.splitlines() == [
        "any in float32, jax by native (AMX) kernels, torch by framework kernels: 1 request, 9 tokens, 4 steps.",
        "equal: the finding",
        "look elsewhere",
    ]


@pytest.mark.parametrize(
    ("errors", "wrong"), [((1e-6, 0.5), (False, True)), ((float("inf"), 1e-6), (True, False)), ((0.3, 0.4), (True, True))]
)
def test_the_engine_far_from_float64_is_the_wrong_one(errors: tuple[float, float], wrong: tuple[bool, bool]) -> None:
    found = Finding(step=0, request=0, position=0, layer=0, tensor="q", difference=0.5, errors=errors)
    assert found.wrong == wrong
