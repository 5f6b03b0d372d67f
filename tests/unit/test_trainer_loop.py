"""The training loop: what decides a run's losses is the settings, not where it was broken off or how it is spread."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import portrait as command_line
from benchmarks import train as bench
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import ADAPTED
from tests.tiny_recipe import Numbers, Tiny, exit_statuses, settings
from trainer.dataset import world_sample
from trainer.loop import _Watch, progress, rate_at, seeded, train
from trainer.shards import writing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its settings in the process; each test begins without any, and on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(output, recipe=Tiny, **changes):
    chosen = settings(output, **changes)
    return train(seeded(recipe, chosen), chosen)


def losses(output):
    """The lines of losses.jsonl without the one number that time decides."""
    lines = [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("samples_per_second") > 0
    return lines


def exported(output):
    return load_file(output / "export" / "tiny.safetensors")


def checkpoints(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def sending(output, call, number, **changes):
    """The exit status of a run in a process (group) of its own, which in that forward pass gets that signal."""
    (status,) = exit_statuses(output, call, int(number), [{}], **changes)
    return status


def sending_of_two(output, call, number, **changes):
    """The exit statuses of two that train together, of which the second gets the signal."""
    # As accelerate launch starts them. With ACCELERATE_USE_CPU it would want mpirun.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": None}
    shared |= {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return exit_statuses(output, call, int(number), ranks, **changes)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


# ------------------------------------------------------------------------------------------------------------- resume


def test_a_killed_run_goes_on_with_the_very_losses_of_an_unbroken_one(tmp_path):
    run(tmp_path / "whole", steps=20)
    # In the middle of step 12: after the checkpoint of step 8 and the lines of steps 10 and 12 less one.
    assert sending(tmp_path / "killed", 12, signal.SIGKILL, steps=20) == -signal.SIGKILL
    assert checkpoints(tmp_path / "killed") == ["step-00000004", "step-00000008"]
    assert losses(tmp_path / "killed")[-1]["step"] == 10
    with (tmp_path / "killed" / "losses.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # as a process leaves it that dies while it writes
    assert run(tmp_path / "killed", steps=20) == 20
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 10
    for name, tensor in exported(tmp_path / "whole").items():
        assert exported(tmp_path / "killed")[name].equal(tensor), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_is_asked_to_end_saves_after_the_step_under_way(tmp_path, number, accumulate):
    """Between two lines of the log, whose means are those of an unbroken run all the same."""

    def ask(recipe):
        if recipe.calls == 5 * accumulate - (accumulate - 1):
            os.kill(os.getpid(), number)

    def recipe(each_call=None):
        return Tiny(Numbers(10, bad=frozenset({3})), each_call=each_call)

    changes = {"log_every": 4, "accumulate": accumulate}
    before = signal.getsignal(number)
    assert run(tmp_path, lambda: recipe(ask), **changes) == 5
    assert signal.getsignal(number) is before
    assert checkpoints(tmp_path) == ["step-00000004", "step-00000005"]
    run(tmp_path, recipe, **changes)
    run(tmp_path / "whole", recipe, **changes)
    assert [line["step"] for line in losses(tmp_path)] == [4, 8, 12]
    assert losses(tmp_path) == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_processes_that_load_data_hear_the_signal_too_and_the_step_still_ends(tmp_path, number):
    """As with a terminal's Ctrl-C; the step needs more batches than they have made beforehand."""
    changes = {"accumulate": 8, "workers": 1}
    assert sending(tmp_path, 4 * 8 + 1, number, **changes) == 0
    assert checkpoints(tmp_path) == ["step-00000004", "step-00000005"]
    run(tmp_path, **changes)
    run(tmp_path / "whole", **changes)
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_checkpoints_between_two_lines_of_the_log_lose_none_of_their_means(tmp_path):
    changes = {"log_every": 5, "save_every": 2}
    run(tmp_path, steps=7, **changes)
    assert checkpoints(tmp_path) == ["step-00000006", "step-00000007"]
    assert sending(tmp_path, 3, signal.SIGKILL, **changes) == -signal.SIGKILL
    assert checkpoints(tmp_path) == ["step-00000007", "step-00000008"]
    run(tmp_path, **changes)
    run(tmp_path / "whole", **changes)
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_checkpoint_or_export_that_was_broken_off_does_not_count(tmp_path, monkeypatch):
    def broken(self, folder, facts):
        (folder / "tiny.safetensors").write_bytes(b"half")
        raise OSError("the disk is full")

    run(tmp_path, steps=4)
    good = exported(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr(Tiny, "export", broken)
        run(tmp_path, steps=12)
    assert all(exported(tmp_path)[name].equal(tensor) for name, tensor in good.items())
    (tmp_path / "checkpoints" / "step-00000008.part").mkdir()
    run(tmp_path)
    run(tmp_path / "whole")
    assert losses(tmp_path) == losses(tmp_path / "whole")
    assert checkpoints(tmp_path) == ["step-00000008", "step-00000012"]


def test_a_finished_run_exports_again_and_goes_on_with_more_steps(tmp_path):
    run(tmp_path)
    (tmp_path / "export" / "tiny.safetensors").unlink()
    assert run(tmp_path) == 12
    assert exported(tmp_path)
    assert run(tmp_path, steps=16) == 16
    run(tmp_path / "whole", steps=16)
    assert losses(tmp_path) == losses(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"rate": 2e-2}, {"batch": 2}, {"seed": 1}, {"ema": 0.0}, {"accumulate": 2}])
def test_a_folder_with_a_run_of_other_settings_is_refused(tmp_path, change):
    run(tmp_path, steps=2)
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(PortraitError, match=r"holds a run with other settings: .* -> .*another --output"):
        run(tmp_path, steps=4, **change)
    with pytest.raises(PortraitError, match="samples 10 -> 11"):
        run(tmp_path, lambda: Tiny(Numbers(11)), steps=4)
    assert (tmp_path / "run.json").read_text() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": -1},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"ema": 1.0},
        {"seed": -1},
        {"precision": "half"},
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, wrong):
    with pytest.raises(PortraitError) as caught:
        settings(tmp_path, **wrong)
    assert caught.value.field == next(iter(wrong))


# --------------------------------------------------------------------------------------------------- what is computed


def test_accumulated_gradients_are_those_of_the_bigger_batch(tmp_path):
    def plain():
        return Tiny(Numbers(noise=0.0), drawn=False)

    run(tmp_path / "accumulated", plain, batch=2, accumulate=3)
    run(tmp_path / "big", plain, batch=6)
    for small, big in zip(losses(tmp_path / "accumulated"), losses(tmp_path / "big"), strict=True):
        assert small["loss"] == pytest.approx(big["loss"], rel=1e-5)
        assert small["gradient"] == pytest.approx(big["gradient"], rel=1e-4)
    for name, tensor in exported(tmp_path / "big").items():
        torch.testing.assert_close(exported(tmp_path / "accumulated")[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_exported_weights_are_the_average_of_the_trained_ones(tmp_path):
    """Decay min(0.6, 1 - (1 + k)^-0.75), k counted from the second step, in which it is 0."""
    seen = []

    def note(recipe):
        seen.append({name: tensor.clone() for name, tensor in recipe.state_dict().items()})

    run(tmp_path, lambda: Tiny(each_call=note), steps=8, save_every=2, ema=0.6)
    # A forward pass sees the weights of the step before, never the averaged ones that were exported meanwhile.
    trained = [*seen[1:], load_file(tmp_path / "checkpoints" / "step-00000008" / "model.safetensors")]
    average = seen[0]
    for step, weights in enumerate(trained):
        decay = min(0.6, 1 - (1 + step) ** -0.75) if step else 0.0
        average = {name: decay * average[name] + (1 - decay) * tensor for name, tensor in weights.items()}
    for name, tensor in average.items():
        torch.testing.assert_close(exported(tmp_path)[name], tensor, rtol=1e-5, atol=1e-6)
        assert not torch.equal(exported(tmp_path)[name], trained[-1][name])
    with safe_open(tmp_path / "export" / "tiny.safetensors", "pt") as file:
        assert file.metadata() == {"trainer": "portrait", "recipe": "tiny", "steps": "8", "seed": "0"}


def test_the_rate_rises_and_falls_as_asked(tmp_path):
    chosen = settings(tmp_path, steps=20, warmup=4, cooldown=10)
    rates = [rate_at(step, chosen) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9:11] == [1.0, 1.0] and rates[15] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:])) and 0 < rates[19] < 0.05


def test_under_a_budget_the_rate_falls_by_the_clock(tmp_path):
    chosen = settings(tmp_path, steps=10**6, warmup=4, budget=10.0, cooldown=0)
    assert [rate_at(step, chosen, 0.0) for step in (0, 3, 5)] == [0.25, 1.0, 1.0]
    assert rate_at(50, chosen, 300.0) == 1.0
    assert rate_at(50, chosen, 450.0) == pytest.approx(0.5)
    assert rate_at(50, chosen, 600.0) == rate_at(50, chosen, 700.0) == pytest.approx(0.0)


def test_a_budget_is_spent_over_all_starts_and_then_the_run_is_done(tmp_path):
    """Broken off once by the minutes of a start, then gone on with, then left alone."""
    chosen = {"steps": 10**6, "budget": 0.05, "save_every": 10**6, "log_every": 10**6}
    first = run(tmp_path, minutes=0.02, **chosen)
    broken = progress(settings(tmp_path, **chosen))
    assert (broken.step, broken.done) == (first, False) and 1.2 <= broken.seconds < 3
    second = run(tmp_path, **chosen)
    ended = progress(settings(tmp_path, **chosen))
    assert second > first and (ended.step, ended.done) == (second, True) and ended.seconds >= 3
    assert run(tmp_path, **chosen) == second
    # More of it, and it goes on; steps end a run as well.
    assert not progress(settings(tmp_path, **{**chosen, "budget": 5.0})).done
    assert progress(settings(tmp_path, **{**chosen, "budget": 5.0, "steps": second})).done


def test_runs_of_several_precisions_follow_one_another_in_a_process(tmp_path):
    for number, precision in enumerate(("no", "bf16", "no")):
        assert run(tmp_path / str(number), precision=precision, steps=2) == 2


def test_the_seed_decides_the_first_weights_and_all_losses(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(5)
        run(tmp_path / name, seed=seed, steps=4)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_worker_processes_change_nothing(tmp_path):
    run(tmp_path / "none")
    run(tmp_path / "two", workers=2)
    assert losses(tmp_path / "none") == losses(tmp_path / "two")


# ----------------------------------------------------------------------------------------------------------- bad data


def test_bad_samples_are_counted_and_passed_over_also_after_a_resume(tmp_path, capsys):
    def recipe():
        return Tiny(Numbers(10, bad=frozenset({2, 3})))

    run(tmp_path, recipe, steps=20)
    # 8 epochs: number 2 costs two samples each, number 3 one.
    assert losses(tmp_path)[-1]["unusable"] == 8 * 3
    assert "24 samples could not be used and were passed over." in capsys.readouterr().out
    run(tmp_path / "twice", recipe, steps=12)
    run(tmp_path / "twice", recipe, steps=20)
    assert losses(tmp_path / "twice") == losses(tmp_path)


def test_data_without_a_good_sample_ends_the_run_with_the_reason(tmp_path):
    with pytest.raises(PortraitError, match=r"100 samples in a row cannot be used, .* number \d is bad"):
        run(tmp_path, lambda: Tiny(Numbers(10, bad=frozenset(range(10)))))


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(tmp_path):
    def spoil(recipe):
        if recipe.calls == 7:
            torch.nn.init.constant_(recipe.layers[0].weight, float("nan"))

    with pytest.raises(PortraitError, match=r"loss: .* not a finite number since step 7; the state of step 4 .* kept"):
        run(tmp_path, lambda: Tiny(each_call=spoil))
    assert checkpoints(tmp_path) == ["step-00000004"]
    assert all(tensor.isfinite().all() for tensor in exported(tmp_path).values())


def test_a_short_run_that_diverges_between_two_lines_of_the_log_leaves_nothing(tmp_path):
    with pytest.raises(PortraitError, match=r"since step 2\. Begin anew with a lower --rate than 1e\+30, in another"):
        run(tmp_path, steps=6, rate=1e30, warmup=0, log_every=20, save_every=20)
    assert not (tmp_path / "export").exists() and not (tmp_path / "checkpoints").exists()


def test_weights_that_the_last_step_has_broken_are_not_saved(tmp_path):
    """Its loss was computed with the weights before it, and is all right."""
    with pytest.raises(PortraitError, match="weights: 4 of 4 tensors are not finite after step 1"):
        run(tmp_path, steps=1, rate=1e39, warmup=0, ema=0.0)
    assert not (tmp_path / "export").exists() and not (tmp_path / "checkpoints").exists()


def test_weights_too_large_for_the_precision_that_is_written_are_not_exported(tmp_path, monkeypatch):
    run(tmp_path, steps=4)
    good = exported(tmp_path)
    monkeypatch.setattr(
        Tiny,
        "export",
        lambda self, folder, facts: save_file(
            {name: (tensor + 1e5).half() for name, tensor in self.state_dict().items()}, folder / "tiny.safetensors"
        ),
    )
    with pytest.raises(PortraitError, match="export: 4 tensors hold infinities or NaN as they would be written"):
        run(tmp_path, steps=8)
    assert all(exported(tmp_path)[name].equal(tensor) for name, tensor in good.items())
    assert not (tmp_path / "export.part").exists()


def test_gradients_that_float16_cannot_hold_are_not_taken_for_a_broken_run(tmp_path):
    """The scaling of the loss leaves their steps out; a loss that is no number still is one."""
    accelerator = Accelerator()
    overflown = {"loss": torch.tensor(1.0), "gradient": torch.tensor(torch.inf)}
    for scaler in (None, object()):
        accelerator.scaler = scaler
        watch = _Watch(accelerator, settings(tmp_path))
        watch.see(3, overflown)
        if scaler is None:
            with pytest.raises(PortraitError, match="since step 3"):
                watch.refuse_unsound(4, None)
        else:
            watch.refuse_unsound(4, None)
            watch.see(5, {"loss": torch.tensor(torch.nan)})
            watch.see(6, {"loss": torch.tensor(torch.nan)})
            with pytest.raises(PortraitError, match="since step 5"):
                watch.refuse_unsound(6, None)


def test_a_precision_that_the_device_does_not_have_is_refused_with_one_that_it_has(tmp_path):
    with pytest.raises(PortraitError, match=r"precision: fp16 .* this device does not .*Give bf16 or no\."):
        run(tmp_path, precision="fp16")
    assert not (tmp_path / "run.json").exists()


def test_averaged_weights_are_refused_for_what_normalises_by_batch(tmp_path):
    def normalising():
        recipe = Tiny()
        recipe.norm = torch.nn.BatchNorm1d(4)
        return recipe

    with pytest.raises(PortraitError, match=r"batch.*Add --ema 0"):
        run(tmp_path, normalising, ema=0.9)
    run(tmp_path, normalising, ema=0.0)  # the remedy holds in the same folder


# ---------------------------------------------------------------------------------------------------------------- log


def test_tensorboard_has_losses_and_pictures_and_no_step_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, steps=8, sample_every=4)
    run(tmp_path, steps=12, sample_every=4)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in events.Images("noise")] == [4, 8, 12]


# -------------------------------------------------------------------------------------------------- several processes


def test_a_launch_that_would_cut_the_weights_into_pieces_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(PortraitError, match="FSDP cuts weights into pieces.*--multi_gpu"):
        run(tmp_path)


def test_two_processes_of_accelerate_launch_train_what_one_does(tmp_path, capsys):
    """The real command line, with a real recipe: `accelerate launch portrait.py train vae`, beside one process."""
    with writing(tmp_path / "world-00000.tar") as shard:
        for seed in range(6):
            made = world_sample(seed, 100, 64)
            shard.add(made.key, made.picture, made.suffix, made.record, None)
    words = ["train", "vae", "--data", str(tmp_path), "--steps", "4", "--crop", "32", "--rate", "1e-4", "--warmup", "1"]
    words += ["--log-every", "1", "--save-every", "2", "--ema", "0.5"]
    # portrait.py in this environment, which is as it should be.
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport portrait\nportrait.ensure = lambda *_: None\n"
        "sys.exit(portrait.main(sys.argv[1:]))\n"
    )
    # Accelerate's --cpu would need mpirun; its --multi_gpu starts processes, and they take what device there is.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", free_port(), str(script), *words, "--batch", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    both = subprocess.run(
        [*launch, "--output", str(tmp_path / "two")],
        env={**environment, "PORTRAIT_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert both.returncode == 0, both.stdout + both.stderr
    assert both.stdout.count("Step 4 of 4") == both.stdout.count("Samples a step: 4 (2 processes x 1 x 2)") == 1
    assert command_line.run(command_line.parse([*words, "--batch", "4", "--output", str(tmp_path / "one")])) == 0
    said = capsys.readouterr().out
    assert re.search(r"Step 4 of 4; weights in .*one/export", said.replace("\\", "/"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    for alone, shared in zip(one, two, strict=True):
        for name in ("loss", "absolute", "kl", "gradient"):
            assert shared[name] == pytest.approx(alone[name], rel=2e-4), (name, alone["step"])
    weights = [load_file(tmp_path / name / "export" / "vae.safetensors") for name in ("one", "two")]
    differences = torch.cat([(weights[0][name] - weights[1][name]).abs().flatten() for name in weights[0]])
    # Adam makes whole steps of gradients that are nothing but rounding.
    assert float(differences.mean()) < 1e-6 and float(differences.max()) < 1e-4


def test_when_one_of_two_processes_is_asked_to_end_both_save_after_that_step(tmp_path):
    changes = {"batch": 2, "log_every": 4}
    assert sending_of_two(tmp_path / "two", 5, signal.SIGTERM, **changes) == [0, 0]
    assert checkpoints(tmp_path / "two") == ["step-00000004", "step-00000005"]
    assert sending_of_two(tmp_path / "two", 0, 0, **changes) == [0, 0]
    run(tmp_path / "one", lambda: Tiny(drawn=False), log_every=4)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [line["step"] for line in two] == [4, 8, 12]
    for alone, shared in zip(one, two, strict=True):
        for name in ("loss", "gradient"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-4), (name, alone["step"])


class Dropped(Tiny):
    """Nothing of what it learns takes part in every other batch."""

    def forward(self, batch, draws):
        losses = super().forward(batch, draws)
        return {name: one.detach() for name, one in losses.items()} if self.calls % 2 else losses


def test_a_batch_in_which_everything_was_dropped_trains_nothing(tmp_path):
    train(Dropped(), settings(tmp_path, steps=4, warmup=0, log_every=1, save_every=4))
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [line["gradient"] == 0 for line in lines] == [True, False, True, False]


# -------------------------------------------------------------------------------------------------------------- bench


@pytest.mark.parametrize("method", ADAPTED)
def test_the_bench_measures_the_loop_beside_an_untouched_unet_with_the_same_weights(monkeypatch, capsys, method):
    bares = []

    class Noted(bench.Bare):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.steps = 0
            bares.append(self)

        def step(self):
            super().step()
            self.steps += 1

    def alone(command, **options):
        return subprocess.CompletedProcess(command, 0, stdout=f"{2**20 * (2 if 'loop' in command else 1)}\n")

    def forward(recipe, batch, draws):
        # What takes marks off contexts is there; a method may leave attention layers as they are.
        assert recipe.recipe.model.unet._forward_pre_hooks
        return paired(recipe, batch, draws)

    paired = bench.Paired.forward
    monkeypatch.setattr(bench.Paired, "forward", forward)
    monkeypatch.setattr(bench, "Bare", Noted)
    monkeypatch.setattr(bench.subprocess, "run", alone)
    words = ["bench", "train", "--method", method, "--batch", "1", "--steps", "1", "--pairs", "5"]
    assert command_line.run(command_line.parse(words)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    ((unet, steps),) = [(bare.unet, bare.steps) for bare in bares]
    assert steps == 7  # one to warm up, five pairs, and the last one's end
    assert not any("forward" in vars(module) for module in unet.modules())
    assert not any(p.requires_grad or p.grad is not None for p in unet.parameters())
    assert (figures["loop_peak_mib"], figures["bare_peak_mib"]) == (2, 1)
    ratios = sorted(bare / loop for bare, loop in figures["pairs"])
    assert len(ratios) == 5 and figures["ratio"] == pytest.approx(ratios[2], abs=0.02)
