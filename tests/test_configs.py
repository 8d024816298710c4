"""Every configuration file composes, and says what the code behind it says."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

import configs
from common.config import EngineConfig
from common.errors import ConfigError
from common.weights import zoo
from experiments.cli.launch import group_options, set_not_added, spell_out_model
from experiments.correctness.config import CorrectnessConfig
from experiments.engines.compose import engine_label, engine_specs
from experiments.engines.spec import engine_spec
from experiments.load.workload import Lengths, WorkloadConfig
from experiments.measure.config import MeasureConfig
from experiments.options import resolved

FOLDER = Path(configs.__file__).parent
WORKLOADS = {
    "single": WorkloadConfig(name="single", num_requests=1, prompt_len=32, output_len=256),
    "prefill": WorkloadConfig(name="prefill", num_requests=4, prompt_len=1024, output_len=1),
    "ragged": WorkloadConfig(
        name="ragged",
        num_requests=64,
        prompt_len=Lengths(mu=4.7, sigma=0.8, low=8, high=1024),
        output_len=Lengths(mu=4.5, sigma=0.7, low=8, high=512),
    ),
}


@contextmanager
def hydra_initialized() -> Iterator[None]:
    with initialize_config_module("configs", version_base="1.3"):
        yield


def composed(name: str, *overrides: str) -> DictConfig:
    with hydra_initialized():
        return compose(name, list(overrides))


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))


def test_the_roots_have_the_stable_overrides() -> None:
    assert {"engine", "model", "workload", "kernels", "dtype", "seed", "device"} <= set(composed("bench"))
    assert {"engines", "model", "workload", "kernels", "dtype", "seed", "device"} <= set(composed("compare"))


def test_engine_base_lists_every_option_with_its_default() -> None:
    values = resolved(composed("bench").engine)
    assert values.pop("name") == "jax"
    assert values == asdict(EngineConfig())


@pytest.mark.usefixtures("peers_there")
@pytest.mark.parametrize("name", names("engine"))
def test_every_engine_is_valid_and_goes_by_its_file(name: str) -> None:
    spec = engine_spec(composed("bench", f"engine={name}", "dtype=float32", "threads=1", "seed=7").engine)
    assert spec.name == spec.label == name
    assert (spec.config.dtype, spec.config.threads, spec.config.seed) == ("float32", 1, 7)


@pytest.mark.parametrize("name", names("workload"))
def test_every_workload_is_valid_and_goes_by_its_file(name: str) -> None:
    config = WorkloadConfig.of(resolved(composed("bench", f"workload={name}").workload))
    assert config.name == name
    assert config == WORKLOADS.get(name, config)


def test_lengths_can_be_overridden_by_a_number_and_by_a_part() -> None:
    one = WorkloadConfig.of(resolved(composed("bench", "workload=ragged", "workload.output_len=4").workload))
    other = WorkloadConfig.of(resolved(composed("bench", "workload=ragged", "workload.output_len.high=64").workload))
    assert one.output_len == 4
    assert other.output_len == Lengths(mu=4.5, sigma=0.7, low=8, high=64)


@pytest.mark.parametrize(
    ("name", "ranks", "stages", "replicas"),
    [
        ("none", 1, 1, 1),
        ("tp2", 2, 1, 1),
        ("tp4", 4, 1, 1),
        ("pp2", 1, 2, 1),
        ("tp2pp2", 2, 2, 1),
        ("dp2", 1, 1, 2),
        ("pd1", 1, 1, 1),
    ],
)
def test_every_parallel_reaches_the_engines(name: str, ranks: int, stages: int, replicas: int) -> None:
    assert name in names("parallel") and len(names("parallel")) == 7
    sizes = attrgetter("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    assert sizes(composed("bench", f"parallel={name}").engine) == (ranks, stages, replicas)
    config = composed("compare", f"parallel={name}", "engines=[torch,{name:torch,tensor_parallel_size:3,data_parallel_size:4}]")
    with hydra_initialized():
        configs = [spec.config for spec in engine_specs(config)]
    assert [sizes(each) for each in configs] == [(ranks, stages, replicas), (3, stages, 4)]


def test_the_number_of_replicas_can_be_any() -> None:
    assert composed("bench", "parallel=dp2", "parallel.data=5").engine.data_parallel_size == 5
    engine = composed("bench", "parallel=pd1", "parallel.data=2", "engine=torch", "engine.prefill_backend=jax").engine
    assert (engine.prefill_parallel_size, engine.data_parallel_size, engine.prefill_backend) == (1, 2, "jax")


@pytest.mark.parametrize("name", names("measure"))
def test_every_measure_is_valid(name: str) -> None:
    MeasureConfig(**resolved(composed("compare", f"measure={name}").measure))


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_states_its_purpose_and_composes(name: str) -> None:
    text = (FOLDER / "experiment" / f"{name}.yaml").read_text()
    assert all(word in text for word in ("# Purpose: ", "# Command: ", "# Expect: "))
    config = composed("compare", f"experiment={name}")
    given = OmegaConf.load(FOLDER / "experiment" / f"{name}.yaml").get("engines")
    assert config.engines == (given or ["jax", "torch"])
    with hydra_initialized():
        assert len(engine_specs(config)) >= 2
    CorrectnessConfig(**resolved(config.correctness))
    WorkloadConfig.of(resolved(config.workload))


def test_the_group_model_holds_the_zoo() -> None:
    assert set(group_options("model")) == {*zoo.names(), "path"}
    for name in zoo.names():
        assert resolved(composed("bench", f"model={name}").model) == {"name": name}


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("model=smollm2-135m", ["model=smollm2-135m"]),
        ("model=/a/b.gguf", ["model=path", "model.name=/a/b.gguf"]),
        ("model=org/name", ["model=path", "model.name=org/name"]),
        ("model=/a=b", ["model=path", "model.name='/a=b'"]),
        ("model=tiny-llama,tiny-qwen3", ["model=tiny-llama,tiny-qwen3"]),
        ("workload=ragged", ["workload=ragged"]),
        ("--help", ["--help"]),
    ],
)
def test_a_model_is_a_name_or_a_path(argument: str, meant: list[str]) -> None:
    assert spell_out_model(argument) == meant


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("+seed=1", "seed=1"),
        ("++foo.bar={a:1}", "foo.bar={a:1}"),
        ("+engine.extra_body.top_k=1", "+engine.extra_body.top_k=1"),
        ("+hydra.job.env_set.A=1", "+hydra.job.env_set.A=1"),
        ("fail_if=[a+b]", "fail_if=[a+b]"),
        ("~seed", "~seed"),
    ],
)
def test_an_option_is_set_and_not_added(argument: str, meant: str) -> None:
    assert set_not_added(argument) == meant


def test_root_options_reach_every_engine_of_a_comparison() -> None:
    config = composed("compare", "engines=[jax,{name:torch,compile:true},torch,hf]", "dtype=float32", "seed=3", "device=cpu")
    with hydra_initialized():
        specs = engine_specs(config)
    assert [spec.label for spec in specs] == ["jax", "torch-compile", "torch", "hf"]
    assert [spec.config.compile for spec in specs] == [False, True, False, False]
    assert {(spec.config.dtype, spec.config.seed, spec.config.device) for spec in specs} == {("float32", 3, "cpu")}
    assert specs[3].config.max_num_seqs == 16


@pytest.mark.parametrize(
    ("engines", "labels"),
    [
        ("[torch,torch,torch]", ["torch", "torch-2", "torch-3"]),
        ("[torch,{name:torch,kernels:framework}]", ["torch", "torch-kernels=framework"]),
        ("[{name:torch,compile:true,block_size:8},{name:torch,compile:true}]", ["torch-compile-block_size=8", "torch-compile"]),
        ("[{name:torch,compile:true},{name:torch,compile:true}]", ["torch-compile", "torch-compile-2"]),
        ("[torch,{name:torch,block_size:16}]", ["torch", "torch-2"]),  # the default, spelt out
        (
            "[{name:torch,num_blocks:100,max_num_seqs:8,block_size:8},{name:torch,num_blocks:100,max_num_seqs:8,block_size:32}]",
            ["torch-block_size=8", "torch-block_size=32"],  # long otherwise
        ),
        ("[jax,{name:hf,device:'a/b c'}]", ["jax", "hf-device=a_b_c"]),  # a log file is called so
    ],
)
def test_labels_say_what_differs(engines: str, labels: list[str]) -> None:
    config = composed("compare", f"engines={engines}")
    with hydra_initialized():
        assert [spec.label for spec in engine_specs(config)] == labels


def test_an_entry_with_a_label_goes_by_it() -> None:
    config = composed("compare", "engines=[{name:torch,label:whole,max_num_seqs:8},{name:torch,max_num_seqs:8},torch]")
    with hydra_initialized():
        specs = engine_specs(config)
    assert [spec.label for spec in specs] == ["whole", "torch-max_num_seqs=8", "torch"]
    assert [spec.config.max_num_seqs for spec in specs] == [8, 8, 64] and {spec.name for spec in specs} == {"torch"}


@pytest.mark.parametrize(
    ("engines", "told"),
    [
        *(
            (f"[jax,{{name:torch,label:{label}}}]", "label must be a word")
            for label in ("''", "a/b", "..", "7", "null", "x" * 25)
        ),
        ("[torch,{name:torch,label:jax}]", "name of another engine"),
        ("[{name:torch,label:a},{name:jax,label:a}]", "Two engines are called 'a'"),
        ("[torch,torch,{name:torch,label:torch-2}]", "Two engines are called 'torch-2'"),
        ("[jax,{name:torch,labl:a}]", "Did you mean 'label'"),
    ],
)
def test_a_label_that_cannot_be_is_refused(engines: str, told: str) -> None:
    config = composed("compare", f"engines={engines}")
    with hydra_initialized(), pytest.raises(ConfigError, match=re.escape(told)):
        engine_specs(config)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_engines_of_disaggregation_have_names_to_be_read(backend: str) -> None:
    config = composed("compare", "experiment=disaggregation", f"pair.backend={backend}")
    with hydra_initialized():
        assert [(spec.label, spec.name) for spec in engine_specs(config)] == [
            *(("whole", backend), ("chunked", backend), ("apart", backend))
        ]


def test_options_that_are_mappings_or_lists_have_labels_too() -> None:
    options = {"environment": {"A": 1, "B": {"C": "x y"}}, "arguments": ["-a", "b"], "same": 3}
    defaults = {"environment": {}, "arguments": [], "same": 3}
    assert engine_label({"name": "server"} | options, defaults) == "server-environment.A=1-environment.B.C=x_y-arguments=_-a_b_"
    assert len(engine_label({"name": "server", "a": "x" * 500}, {"a": None})) == 80


def test_no_configuration_names_python_code() -> None:
    named = [path for path in FOLDER.rglob("*.yaml") if "_target_" in path.read_text()]
    assert all(path.parent.parent == FOLDER / "hydra" for path in named)  # but that of Hydra's own plugins


def test_every_file_is_plain_yaml() -> None:
    for path in FOLDER.rglob("*.yaml"):
        assert isinstance(OmegaConf.load(path), DictConfig), path
