"""LoRA: adapters are what is trained, published and kept; what is served and exported has them merged in."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.engines.transformers import copy_weights
from common.config.load import resolve_config
from common.errors import OperatorError
from common.weights.policy import (
    BASE_HASH,
    SCALE,
    check_fit,
    is_adapters,
    pack_adapters,
    shapes_of_base,
    tensors_of_policy,
)
from common.weights.snapshot import Snapshot, write_snapshot
from learner.adapters import trained_parameters
from learner.batch import build_batch
from learner.final import export_policy
from learner.ranks import Ranks
from learner.trainer import Trainer
from tests.rank_steps import KINDS, Kind
from tests.runs import LocalRun, audit, import_experts, read_lines, read_summary, run_module, write_config
from tests.steps import CPU, LORA, check_restores_to_the_bit, make_engine, make_policy, some_rows, take_steps
from tests.tiny_model import make_tiny_model

WITH_LORA = [kind for kind in KINDS if kind.lora]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return Ranks(CPU)


def snapshot_of_adapters(base: Path, path: Path, *, scale: float = LORA.scale) -> Snapshot:
    """Of the policy that `make_policy` gives with adapters."""
    policy = make_policy(base, lora=LORA)
    adapters = {name: parameter.detach() for name, parameter in trained_parameters(policy.lm)}
    packed = pack_adapters(adapters, base=base, scale=scale)
    return write_snapshot(packed, path, run_id="test", incarnation=1, step=1, chunk_bytes=1 << 20)


def test_adapters_alone_are_trained_and_a_version_of_them_is_small(base: Path, ranks: Ranks, tmp_path: Path) -> None:
    engine = make_engine(base, ranks, lora=LORA)
    before = engine.tensors(torch.float32)
    assert len(before) == 2 * 7 * 2  # A and B of seven linear layers in each of two layers
    take_steps(engine, ranks, some_rows())
    after = engine.tensors(torch.float32)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    internals: Any = engine
    untouched = dict(load_file(base / "model.safetensors"))
    for name, parameter in internals._model.lm.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, untouched[name.replace(".base_layer", "")].float())
    small = snapshot_of_adapters(base, tmp_path / "adapters.safetensors").manifest.num_bytes
    assert small < 0.5 * (base / "model.safetensors").stat().st_size


def test_what_is_merged_scores_as_the_learner_does(base: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of_adapters(base, tmp_path / "adapters.safetensors")
    merged: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    copy_weights(snapshot.path, merged, base=base)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    policy = make_policy(base, lora=LORA)
    row = some_rows(temperature=1.0)[0]
    with torch.no_grad():
        ours, _ = policy(build_batch([row]))
    for model, is_same in ((merged, True), (plain, False)):
        tokens = torch.tensor([[*row.prompt, *row.branches[0].tokens]], dtype=torch.int64)
        theirs = model(input_ids=tokens).logits[0].detach().log_softmax(-1)[len(row.prompt) - 1 : -1]
        picked = theirs.gather(1, tokens[0, len(row.prompt) :, None])[:, 0]
        wanted = torch.from_numpy(row.branches[0].mask > 0)
        difference = float((picked - ours[0, : len(picked)])[wanted].abs().max())
        assert (difference < 1e-4) == is_same


def test_adapters_of_another_base_or_another_shape_are_refused(base: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of_adapters(base, tmp_path / "adapters.safetensors")
    shapes = shapes_of_base(base)
    check_fit(snapshot.path, shapes, base=base, optional=set())
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(OperatorError, match=r"model.path: .*other: got .*, expected .*: the model that the learner ad"):
        check_fit(snapshot.path, shapes, base=other, optional=set())
    tensors = load_file(snapshot.path)
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    for wrong in (tensors[name][:-1], tensors[name][:, 1:]):
        save_file(tensors | {name: wrong.contiguous()}, tmp_path / "wrong")
        with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.lora_. weight|got an adapter of shapes"):
            check_fit(tmp_path / "wrong", shapes, base=base, optional=set())
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "half")
    with pytest.raises(ValueError, match=r"up_proj.lora_B.weight: got an adapter of shapes \(\) and"):
        check_fit(tmp_path / "half", shapes, base=base, optional=set())


def test_base_and_scale_are_part_of_what_a_version_is_named_by(base: Path, tmp_path: Path) -> None:
    hashes = {
        snapshot_of_adapters(base, tmp_path / str(number), scale=scale).version.hash
        for number, scale in enumerate((1.0, 1.0, 2.0))
    }
    assert len(hashes) == 2
    assert {BASE_HASH, SCALE} < load_file(tmp_path / "0").keys()


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "down_proj")])
def test_only_the_targets_get_adapters(base: Path, targets: tuple[str, ...]) -> None:
    names = [name for name, _ in trained_parameters(make_policy(base, lora=replace(LORA, targets=targets)).lm)]
    assert {name.split(".")[-3] for name in names} == set(targets)
    assert len(names) == 2 * 2 * len(targets)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "nonesuch"])
def test_a_target_that_is_no_linear_layer_is_told_in_one_line(base: Path, target: str) -> None:
    with pytest.raises(
        OperatorError, match=rf'learner.lora_targets: got "{target}", expected .*: down_proj, gate_proj'
    ):
        make_policy(base, lora=replace(LORA, targets=("q_proj", target)))


@pytest.mark.parametrize("kind", WITH_LORA, ids=str)
def test_a_checkpoint_holds_adapters_and_restores_the_run_to_the_bit(
    kind: Kind, base: Path, ranks: Ranks, tmp_path: Path
) -> None:
    engine, other = (make_engine(base, ranks, **kind.options) for _ in range(2))
    check_restores_to_the_bit(engine, other, ranks, tmp_path)


def test_the_export_is_the_merged_policy_as_a_plain_folder(base: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of_adapters(base, tmp_path / "adapters.safetensors")
    export_policy(snapshot, base=base, destination=tmp_path / "final")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    merged = dict(tensors_of_policy(snapshot.path, base))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, merged[name].to(torch.bfloat16)), name
    assert not is_adapters(tmp_path / "final" / "model.safetensors")


def test_a_later_phase_goes_on_with_the_published_adapters(base: Path, ranks: Ranks, tmp_path: Path) -> None:
    path = write_config(
        tmp_path, base, learner={"lora_rank": 4, "lora_alpha": 8.0, "lora_targets": ["q_proj", "up_proj"]}
    )
    trainer, rows = Trainer(resolve_config(path).config, ranks, CPU), some_rows()
    for step in range(2):
        trainer.take(step, rows, mu=1.0)
    published = trainer.published_tensors()
    assert float(published[SCALE]) == 2.0
    save_file(published, tmp_path / "version")
    expected = trainer.parameters_hash()
    trainer.begin_anew(tmp_path / "version")
    assert trainer.parameters_hash() == expected
    again = trainer.published_tensors()
    assert all(torch.equal(again[name], tensor) for name, tensor in published.items())


def test_a_run_of_adapters_survives_a_kill_and_is_repeated_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, run={"num_actors": 1}, algorithm={"preset": "sft_then_rl", "max_staleness": 1},
        learner={
            "lora_rank": 4, "lora_targets": ["q_proj", "down_proj"], "num_steps": 6, "lr": 1e-2,
            "checkpoint_every_steps": 2, "keep_arrivals": True, "num_threads": 1, "effective_mu_every_steps": 2,
        },
    )  # fmt: skip
    import_experts(config)
    with LocalRun(config) as run:
        run.wait_until(lambda: run.num_steps_done() >= 4)
        run.kill("learner")
        run.finish()
    assert len(read_lines(run.folder / "metrics.jsonl")) == 6
    assert read_summary(run.folder)["incarnations"] == 2
    assert read_summary(run.folder)["eval_after"] is not None
    assert audit(run.folder)["violations"] == []
    assert "replayed steps 1 to 6: bit for bit, 6 versions" in run_module("learner", "--replay", str(run.folder)).stdout
    trained, untrained = (load_file(folder / "model.safetensors") for folder in (run.folder / "final", tiny_model))
    changed = {name.split(".")[-2] for name, tensor in untrained.items() if not torch.equal(trained[name], tensor)}
    assert changed == {"q_proj", "down_proj"}
    assert json.loads((run.folder / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    refused = run_module("learner", "--config", str(config), "learner.lora_rank=8", "network.port=5996", check=False)
    assert refused.returncode == 2
    assert "learner.lora_rank: got 8, expected 4 as at its begin" in refused.stderr.splitlines()[-1]
    shutil.rmtree(run.folder)
