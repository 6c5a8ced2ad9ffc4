"""Training: what is trained and how, going on after a crash, several processes, faults."""

import csv
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import fastzs
from fastzs import checkpoints
from fastzs.checkpoints import CheckpointError
from fastzs.files import temporary_beside
from fastzs.models import ClipRC, ZegCLIP
from fastzs.runs import OutputError
from fastzs.train import TrainingError, train
from tests.training import CLASSES, SEEN, TEXT, Scenes, equal_states, flipped, recipe, scores, small, train_small

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*command: str, **variables: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "last" / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def training_state(output: Path, step: int | None = None) -> dict:
    folder = "last" if step is None else f"checkpoints/{checkpoints.name_of(step)}"
    return torch.load(output / folder / "training.pt", weights_only=True)


@pytest.mark.parametrize("kind", [ClipRC, ZegCLIP])
def test_learns_what_is_to_be_learnt(kind, tmp_path):
    model = small(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    outcome = train(model, Scenes(), flipped, TEXT, recipe(max_steps=25), tmp_path, seen=SEEN)
    assert outcome.step == 25
    totals = [float(row["total"]) for row in rows(tmp_path / "log.csv")]
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])
    for name, p in model.named_parameters():
        trained = "prompt" in name or name.startswith("decode_head.")
        assert p.requires_grad == trained
        assert torch.equal(p, before[name]) != trained, name


def test_no_gradient_of_the_tower_is_computed(tmp_path):
    model, seen = small(), []
    step = torch.optim.AdamW.step
    for p in model.parameters():
        if not p.requires_grad:
            with pytest.raises(RuntimeError):
                p.register_hook(print)  # torch has no place for a gradient of it

    def note(optimizer, *rest):
        seen.append({name for name, p in model.named_parameters() if p.grad is not None})
        return step(optimizer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", note)
        train(model, Scenes(), flipped, TEXT, recipe(max_steps=1), tmp_path, seen=SEEN)
    assert seen == [{name for name, p in model.named_parameters() if p.requires_grad}]


def test_tower_can_be_trained(tmp_path):
    model = small()
    before = model.backbone.conv1.weight.clone()
    train(model, Scenes(), flipped, TEXT, recipe(max_steps=2, train=["backbone"]), tmp_path, seen=SEEN)
    assert not torch.equal(model.backbone.conv1.weight, before)
    with pytest.raises(ValueError, match=r"'bakbone'.*begin with backbone, decode_head"):
        train(small(), Scenes(), flipped, TEXT, recipe(train=["bakbone"]), tmp_path / "b", seen=SEEN)


def test_evaluation_sees_the_weights_as_they_are(tmp_path):
    """What the model keeps in evaluation must follow the optimiser."""
    model = small()
    seen = []

    def evaluate(model):
        seen.append(model(torch.ones(1, 3, 32, 32), TEXT))
        return {"hIoU": 0.0}

    plan = recipe(max_steps=2, evaluate_every=1, warmup=0)
    train(model, Scenes(), flipped, TEXT, plan, tmp_path, seen=SEEN, evaluate=evaluate)
    fresh = ClipRC.from_pretrained(tmp_path / "last").eval()
    with torch.no_grad():
        assert torch.equal(fresh(torch.ones(1, 3, 32, 32), TEXT), seen[1])
    assert not torch.equal(seen[0], seen[1])


def test_parts_of_a_batch_give_its_mean_gradient(tmp_path):
    """With one image in each part the losses' normalisers differ, so the parts are scored on the recovery loss."""
    only = {"focal": 0.0, "dice": 0.0}
    plain = {"max_steps": 1, "batch_size": 4}
    for name, changes in {"whole": {}, "parts": {"accumulate": 4}}.items():
        model = small(dropout=0.0)
        plan = recipe(**plain, **changes)
        train(model, Scenes(), flipped, TEXT, plan, tmp_path / name, seen=SEEN, loss_weights=only)
    whole, parts = (training_state(tmp_path / name)["optimizer"]["state"] for name in ("whole", "parts"))
    largest = max(state["exp_avg"].abs().max().item() for state in whole.values())
    for i, state in whole.items():
        assert (state["exp_avg"] - parts[i]["exp_avg"]).abs().max().item() < 1e-6 * largest


def test_clipping(tmp_path):
    train_small(tmp_path, max_steps=1, clip_norm=1e-3)
    moments = [state["exp_avg"] for state in training_state(tmp_path)["optimizer"]["state"].values()]
    norm = torch.stack([moment.norm() for moment in moments]).norm().item() / 0.1  # 1 - beta of the first step
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert float(rows(tmp_path / "log.csv")[0]["gradient_norm"]) > 1


def test_recomputed_activations_give_the_same(tmp_path):
    for name, on in (("kept", False), ("again", True)):
        train_small(tmp_path / name, max_steps=2, checkpointing=on)
    assert same(weights(tmp_path / "kept"), weights(tmp_path / "again"))


def test_recomputed_activations_are_not_kept(tmp_path):
    kept = {}
    for on in (False, True):
        model, scenes = small(dropout=0.0), Scenes(2)
        train(
            model,
            scenes,
            flipped,
            TEXT,
            recipe(max_steps=1, batch_size=2, checkpointing=on),
            tmp_path / str(on),
            seen=SEEN,
        )
        sizes: list[int] = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        images = torch.stack([flipped(*scenes[i])[0] for i in range(2)])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.encode(images)
        kept[on] = sum(sizes)
    assert kept[True] < kept[False] / 4


def test_bf16_keeps_the_weights_in_fp32(tmp_path):
    train_small(tmp_path / "low", max_steps=2, precision="bf16")
    train_small(tmp_path / "high", max_steps=2)
    low, high = weights(tmp_path / "low"), weights(tmp_path / "high")
    assert {t.dtype for t in low.values()} == {torch.float32}
    assert not same(low, high)


def test_moving_average(tmp_path):
    """The average is what is tested and kept; training goes on from the raw weights."""
    train_small(tmp_path / "a", max_steps=4, ema=0.5, save_every=1, keep=[1, 2, 3, 4])
    train_small(tmp_path / "b", max_steps=4, save_every=1, keep=[1, 2, 3, 4])
    name = "decode_head.q_proj.weight"
    average = small().state_dict()[name]
    for step in (1, 2, 3, 4):
        folder = checkpoints.name_of(step)
        raw = load_file(tmp_path / "b" / "checkpoints" / folder / "model.safetensors")[name]
        average = 0.5 * average + 0.5 * raw
        kept = load_file(tmp_path / "a" / "checkpoints" / folder / "model.safetensors")[name]
        assert torch.allclose(kept, average, atol=1e-7)


def test_keeps_best_last_and_what_is_asked_for(tmp_path):
    at = iter([0.2, 0.5, 0.4])
    plan = recipe(max_steps=6, evaluate_every=2, save_every=1, keep=[3])
    outcome = train(
        small(), Scenes(), flipped, TEXT, plan, tmp_path, seen=SEEN, evaluate=lambda model: {"hIoU": next(at)}
    )
    assert (outcome.step, outcome.best, outcome.scores) == (6, 0.5, {"hIoU": 0.4})
    assert (tmp_path / "best").resolve().name == "step_0000004"
    assert (tmp_path / "last").resolve().name == "step_0000006"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_0000003", "step_0000004", "step_0000006"]
    assert [row["hIoU"] for row in rows(tmp_path / "evaluation.csv")] == ["0.2", "0.5", "0.4"]


def test_checkpoint_segments(tmp_path):
    train_small(tmp_path, max_steps=1)
    segmenter = fastzs.load("clip_rc", checkpoint=tmp_path / "last")
    vocabulary = fastzs.Vocabulary(list(CLASSES), embeddings=TEXT)
    assert segmenter(torch.zeros(3, 40, 50, dtype=torch.uint8), vocabulary).labels.shape == (40, 50)


class TestGoingOn:
    @pytest.mark.slow
    def test_killed_at_any_moment(self, tmp_path):
        """A process is killed without warning; what it left goes on to exactly the weights of one that was not."""
        plan = {"max_steps": 14, "save_every": 3, "evaluate_every": 5, "ema": 0.9}
        process = run("tests.training", str(tmp_path / "killed"), *(f"{key}={value}" for key, value in plan.items()))
        log = tmp_path / "killed" / "log.csv"
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and (not log.exists() or len(log.read_bytes().splitlines()) < 9):
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        before = training_state(tmp_path / "killed")["step"]
        reached = int(rows(log)[-1]["step"])
        assert 0 <= reached - before <= plan["save_every"] + 1  # the last line may come before its checkpoint
        assert before < plan["max_steps"]
        train_small(tmp_path / "killed", **plan)
        train_small(tmp_path / "whole", **plan)
        one, other = training_state(tmp_path / "killed"), training_state(tmp_path / "whole")
        assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
        assert all(torch.equal(a, b) for a, b in zip(one["raw"], other["raw"], strict=True))
        for i, state in one["optimizer"]["state"].items():
            assert same(state, other["optimizer"]["state"][i])
        assert one["best"] == other["best"]
        assert [row["step"] for row in rows(log)] == [str(i) for i in range(1, 15)]
        losses = [[row["total"] for row in rows(tmp_path / name / "log.csv")] for name in ("killed", "whole")]
        assert losses[0] == losses[1]

    def test_workers_change_nothing(self, tmp_path):
        train_small(tmp_path / "none", max_steps=4)
        train_small(tmp_path / "two", max_steps=4, workers=2)
        assert same(weights(tmp_path / "none"), weights(tmp_path / "two"))

    def test_finished_training_is_left_alone(self, tmp_path):
        train_small(tmp_path, max_steps=2)
        before = (tmp_path / "last").resolve().stat().st_mtime_ns
        assert train_small(tmp_path, max_steps=2).step == 2
        assert (tmp_path / "last").resolve().stat().st_mtime_ns == before

    def test_another_training_in_the_folder(self, tmp_path):
        train_small(tmp_path, max_steps=2)
        with pytest.raises(ValueError, match=r"other settings \(there lr=0\.001, now lr=0\.1\)"):
            train_small(tmp_path, max_steps=2, lr=0.1)

    def test_half_a_line_and_half_a_checkpoint(self, tmp_path):
        """What a kill in the middle of writing leaves behind."""
        train_small(tmp_path / "a", max_steps=4, save_every=2, keep=[2])
        train_small(tmp_path / "b", max_steps=4, save_every=2, keep=[2])
        out = tmp_path / "a"
        (out / "last").unlink()
        (out / "last").symlink_to("checkpoints/step_0000002")
        temporary_beside(out / "checkpoints" / "step_0000003").mkdir()
        (out / "log.csv").write_text("\n".join((out / "log.csv").read_text().splitlines()[:3]) + "\n3,0.")
        train_small(out, max_steps=4, save_every=2, keep=[2])
        assert same(weights(out), weights(tmp_path / "b"))
        assert [row["step"] for row in rows(out / "log.csv")] == ["1", "2", "3", "4"]
        names = sorted(path.name for path in (out / "checkpoints").iterdir())
        assert names == ["step_0000002", "step_0000004"]

    @pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "checkpoint.json"])
    @pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
    def test_corrupt_checkpoint(self, tmp_path, name, damage):
        train_small(tmp_path, max_steps=1)
        path = (tmp_path / "last" / name).resolve()
        data = bytearray(path.read_bytes())
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(data[: len(data) // 2])
        else:
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        # A digit of checkpoint.json may be one of another file's digest.
        named = name if damage != "flip" or name != "checkpoint.json" else r"\w+\.\w+"
        with pytest.raises(CheckpointError, match=rf"last: {named} .*damaged; remove it, or go on from another"):
            train_small(tmp_path, max_steps=1)


class TestProcesses:
    PLAN: ClassVar = {"max_steps": 3, "keep": [1], "evaluate_every": 1}

    @pytest.mark.slow
    def test_two_processes_are_one(self, tmp_path):
        """Same gradients, losses and scores as one process with the same batches."""
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.training"]
        process = run(*command, str(tmp_path / "two"), *(f"{key}={value}" for key, value in self.PLAN.items()))
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()
        train_small(tmp_path / "one", **self.PLAN)
        # After one step Adam's first moment is the gradient, times 1 - beta.
        first, second = (training_state(tmp_path / name, 1)["optimizer"]["state"] for name in ("one", "two"))
        largest = max(state["exp_avg"].abs().max().item() for state in first.values())
        for i, state in first.items():
            assert (state["exp_avg"] - second[i]["exp_avg"]).abs().max().item() < 1e-6 * largest
        for one, two in zip(*(rows(tmp_path / name / "log.csv") for name in ("one", "two")), strict=True):
            for part in ("focal", "dice", "recovery_queries", "recovery_features", "total", "gradient_norm"):
                assert float(one[part]) == pytest.approx(float(two[part]), rel=1e-3), part
        assert rows(tmp_path / "one" / "evaluation.csv") == rows(tmp_path / "two" / "evaluation.csv")


class TestFaults:
    def test_mask_with_a_label_outside_the_list(self, tmp_path):
        scenes = Scenes()
        scenes.masks[:, 0, 0] = 8
        with pytest.raises(
            ValueError, match=r"scene \d: expected labels from 0 to 7 \(8 classes\) or 255 in the mask, got 8"
        ):
            train(small(), scenes, flipped, TEXT, recipe(), tmp_path, seen=SEEN)

    def test_the_same_from_a_reading_process(self, tmp_path):
        scenes = Scenes()
        scenes.masks[:, 0, 0] = 8
        with pytest.raises(ValueError, match=r"^scene \d: expected labels from 0 to 7 .*, got 8"):
            train(small(), scenes, flipped, TEXT, recipe(workers=1), tmp_path, seen=SEEN)

    def test_empty_data_set(self, tmp_path):
        scenes = Scenes()
        scenes.images, scenes.masks = scenes.images[:0], scenes.masks[:0]
        with pytest.raises(ValueError, match="empty: there are 0 images"):
            train(small(), scenes, flipped, TEXT, recipe(), tmp_path, seen=SEEN)

    def test_text_of_another_number_of_classes(self, tmp_path):
        with pytest.raises(ValueError, match="the data set has 8 classes, the vocabulary 7"):
            train(small(), Scenes(), flipped, TEXT[:7], recipe(), tmp_path, seen=SEEN)

    def test_disk_full_while_saving(self, tmp_path, monkeypatch):
        train_small(tmp_path, max_steps=2)
        before = weights(tmp_path)

        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        for place in ("torch.save", "fastzs.checkpoints._to_disk", "fastzs.models.ClipRC.save_pretrained"):
            with monkeypatch.context() as patch:
                patch.setattr(place, full)
                with pytest.raises(OutputError, match=r"step_0000002: No space left on device"):
                    checkpoints.save(tmp_path, 2, small().save_pretrained, {}, ["last"])
            assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000002"]
        assert same(weights(tmp_path), before)

    @pytest.mark.skipif(sys.platform == "win32", reason="sets a limit that only Unix has")
    @pytest.mark.parametrize("bytes", [100, 1_000, 20_000, 200_000])
    def test_file_that_the_system_cuts_off(self, tmp_path, bytes):
        """Whichever file is the first that does not fit."""
        import resource

        checkpoints.save(tmp_path, 1, small().save_pretrained, {"a": torch.zeros(100_000)}, ["last"])
        before = checkpoints.read(tmp_path / "last")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, limits[1]))
        try:
            with pytest.raises(OutputError, match=r"cannot write the checkpoint .*step_0000002: "):
                checkpoints.save(tmp_path, 2, small().save_pretrained, {"a": torch.ones(100_000)}, ["last"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]
        assert torch.equal(checkpoints.read(tmp_path / "last")["a"], before["a"])

    @pytest.mark.parametrize("workers", [0, 2])
    def test_sigterm_saves_and_stops(self, tmp_path, workers):
        """Also where the readers get it, too, as from a batch system."""
        model = small()

        def evaluate(model):
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            return scores(model)

        before = signal.getsignal(signal.SIGTERM)
        plan = recipe(max_steps=6, evaluate_every=2, workers=workers)
        outcome = train(model, Scenes(), flipped, TEXT, plan, tmp_path, seen=SEEN, evaluate=evaluate)
        assert (outcome.stopped_by, outcome.step) == (signal.SIGTERM, 3)
        assert signal.getsignal(signal.SIGTERM) is before
        assert training_state(tmp_path)["step"] == 3
        assert equal_states(ClipRC.from_pretrained(tmp_path / "last"), model)

    def test_loss_that_is_not_a_number(self, tmp_path, monkeypatch):
        losses = ClipRC.losses

        def bad(model, *args, **kwargs):
            out = losses(model, *args, **kwargs)
            return out | {"total": out["total"] * float("nan")}

        train_small(tmp_path / "good", max_steps=4, save_every=2, keep=[2])
        calls = []

        def third(model, *args, **kwargs):
            calls.append(0)
            return (bad if len(calls) == 3 else losses)(model, *args, **kwargs)

        monkeypatch.setattr(ClipRC, "losses", third)
        with pytest.raises(TrainingError, match=r"step 3: the loss is nan; its images: scene \d, .*; .*last") as error:
            train_small(tmp_path / "bad", max_steps=4, save_every=2)
        assert str(error.value).count("scene") == 4
        monkeypatch.undo()
        assert training_state(tmp_path / "bad")["step"] == 2
        train_small(tmp_path / "bad", max_steps=4, save_every=2)
        assert same(weights(tmp_path / "bad"), weights(tmp_path / "good"))

    def test_gradient_that_is_not_a_number(self, tmp_path, monkeypatch):
        losses = ClipRC.losses

        def bad(model, *args, **kwargs):
            out = losses(model, *args, **kwargs)
            zero = model.decode_head.q_proj.bias.sum() * 0
            return out | {"total": out["total"] + zero.sqrt()}

        monkeypatch.setattr(ClipRC, "losses", bad)
        model = small()
        before = small().state_dict()
        with pytest.raises(TrainingError, match=r"step 1: the norm of the gradients is nan; its images: scene"):
            train(model, Scenes(), flipped, TEXT, recipe(), tmp_path, seen=SEEN)
        assert same(dict(model.state_dict()), dict(before))

    def test_parameters_that_no_loss_needs(self, tmp_path):
        with pytest.raises(ValueError, match=r"parameters are to be trained, but no loss depends on them: .*recovery"):
            train(small(), Scenes(), flipped, TEXT, recipe(), tmp_path, seen=SEEN, loss_weights={"recovery": 0.0})

    def test_batch_that_cannot_be_shared_out(self, tmp_path):
        with pytest.raises(ValueError, match="batch_size 4 cannot be divided evenly among 1 processes, 3 parts"):
            train_small(tmp_path, accumulate=3)

    def test_seen_classes_not_told(self, tmp_path):
        with pytest.raises(ValueError, match="'inductive' needs the seen classes"):
            train(small(), Scenes(), flipped, TEXT, recipe(), tmp_path)

    def test_a_setting_that_the_model_does_not_have(self, tmp_path):
        class OnlyInductive(ZegCLIP):
            transductive = False

        with pytest.raises(ValueError, match="OnlyInductive has no transductive training"):
            train(small(OnlyInductive), Scenes(), flipped, TEXT, recipe(setting="transductive"), tmp_path, seen=SEEN)
