"""The recipe `uniportrait` trains what inference uses: same output, published layout, the paper's losses and drops."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")


from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, mark
from lib_portrait.attention.injection import Call
from lib_portrait.attention.lora import FusedLinear, LowRank
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.errors import PortraitError
from lib_portrait.faces.alignment import template
from lib_portrait.faces.detection import Detector, Face
from lib_portrait.faces.recognition import Backbone
from lib_portrait.methods.uniportrait import Adapter, BatchRule, Identities, Person, UniPortraitRule, routing_loss
from lib_portrait.request import PortraitRequest
from lib_portrait.standalone import layout
from lib_portrait.standalone.model import Model
from lib_portrait.standalone.sampling import Sampling
from tests.adapter_training import CONTEXT, eject, tiny_model
from trainer import adapter_recipe, portraits
from trainer.diffusion import NoiseSchedule, face_weighted
from trainer.draws import Draws
from trainer.faces import faces_of, region_of
from trainer.features import features_path, global_feature, uncaptioned
from trainer.identity_loss import FaceLosses
from trainer.loop import Settings, train
from trainer.portraits import PortraitDataset
from trainer.recipes import uniportrait
from trainer.shards import FaceRecord, Record, Shards, encode_png, writing

TOKENS, GRID, SHALLOW = 4, 16, 24
PEOPLE = (1, 2, 1, 3, 2, 1, 4, 2)


def recognition_network(seed: int = 7) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(blocks=(1, 1, 1, 1), widths=(8, 8, 12, 16, 24), embedding=20, image_size=48).eval()


@pytest.fixture
def recognition(tmp_path: Path) -> Path:
    """The network that the data's features are said to come from."""
    save_file(recognition_network().state_dict(), tmp_path / "recognition.safetensors")
    return tmp_path / "recognition.safetensors"


@pytest.fixture
def data(tmp_path: Path, recognition: Path) -> Path:
    """A shard of eight pictures with one to four people of three names, and random features of their faces."""
    rng = np.random.default_rng(0)
    shard = tmp_path / "data" / "people-00000.tar"
    shard.parent.mkdir()
    where = []
    with writing(shard) as writer:
        for number, people in enumerate(PEOPLE):
            faces = []
            for face in range(people):
                left = 64 / people * face
                box = (left, 8.0, left + 64 / people, 40.0)
                points = tuple((left + 4 + k, 20.0 + k) for k in range(5))
                faces.append(FaceRecord(f"name {(number + face) % 3}", "woman", box, points))
                where.append((number, face))
            picture = encode_png(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            writer.add(f"{number:04d}", picture, "png", Record("a woman", tuple(faces), {}), None)
    tokens = torch.full((len(PEOPLE), 77), 49407)
    tokens[:, 0] = 49406
    torch.manual_seed(1)
    save_file(
        {
            "latents": torch.randn(len(PEOPLE), 4, 8, 8).half(),
            "tokens": tokens.int(),
            "size": torch.full((len(PEOPLE), 2), 64, dtype=torch.int32),
            "intrinsic": torch.randn(len(where), 9, 24).half(),
            "structure": torch.randn(len(where), GRID, 40).half(),
            # As real ones: zeros in place of the recognition network's features, CLIP's of a grey picture beside them.
            "zero_structure": torch.cat([torch.zeros(GRID, SHALLOW), torch.randn(GRID, 40 - SHALLOW)], dim=1).half(),
            "sample": torch.tensor([sample for sample, _ in where], dtype=torch.int32),
            "face": torch.tensor([face for _, face in where], dtype=torch.int32),
        },
        features_path(shard),
        metadata={"backbone": file_sha256(recognition)},
    )
    return shard.parent


def recipe(
    monkeypatch: pytest.MonkeyPatch, data: Path, *arguments: str, model: Model | None = None
) -> uniportrait.UniPortraitRecipe:
    monkeypatch.setattr(adapter_recipe, "load_model", lambda path: model or tiny_model())
    parser = argparse.ArgumentParser()
    uniportrait.configure(parser)
    sizes = ["--rank", "4", "--tokens", str(TOKENS), "--width", "32", "--depth", "2"]
    base = data.parent / "base.safetensors"
    base.write_bytes(b"stands for the checkpoint: exports say which one they were made for")
    options = parser.parse_args(["--checkpoint", str(base), "--name", "tiny", *sizes, *arguments])
    options.data = data
    made = uniportrait.build(options)
    assert isinstance(made, uniportrait.UniPortraitRecipe)
    return made


def trained(monkeypatch: pytest.MonkeyPatch, data: Path, run: Path, *arguments: str) -> uniportrait.UniPortraitRecipe:
    """A recipe after five steps, whose export lies in `run`/export."""
    made = recipe(monkeypatch, data, *arguments)
    settings = Settings(output=run, steps=5, batch=3, rate=5e-3, warmup=0, ema=0.0, log_every=1, save_every=5)
    assert train(made, settings) == 5
    eject(made)
    return made


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


def apart(one: Path, other: Path) -> float:
    """The largest difference of two runs' exported weights."""
    first, second = (load_file(next((run / "export").glob("uniportrait-*.safetensors"))) for run in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> tuple[Path, Path, Model]:
    """The files of both stages after a few steps, and the UNet they were trained on."""
    trained(monkeypatch, data, tmp_path / "one", "--backbone", "eyes.safetensors")
    faceid = tmp_path / "one" / "export" / "uniportrait-faceid_tiny.safetensors"
    second = trained(monkeypatch, data, tmp_path / "two", "--stage", "2", "--faceid", str(faceid))
    return faceid, tmp_path / "two" / "export" / "uniportrait-router_tiny.safetensors", second.model


def half_stored(recipe: uniportrait.UniPortraitRecipe, files: list[Path]) -> None:
    """Gives the recipe the weights as its file holds them, rounded to float16."""
    for file in files:
        recipe.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()}, strict=False)


@pytest.mark.parametrize("people", [1, 3])
def test_what_is_trained_is_what_inference_computes(
    stages: tuple[Path, Path, Model], monkeypatch: pytest.MonkeyPatch, data: Path, people: int
) -> None:
    faceid, router, _ = stages
    arguments = ["--stage", "2", "--faceid", str(faceid)] if people > 1 else []
    training = recipe(monkeypatch, data, *arguments)
    half_stored(training, [router if people > 1 else faceid])
    model = training.model
    adapter = Adapter.from_tensors(load_file(faceid), load_file(router))
    torch.manual_seed(3)
    intrinsic, structure = torch.randn(people, 9, 24), torch.randn(people, GRID, 40)
    latent, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, CONTEXT)
    tokens = adapter.embedding.float()(intrinsic, structure)

    rule = UniPortraitRule(adapter, [Person({POSITIVE: own}) for own in tokens])
    with torch.no_grad(), Injection(model.unet, rule):
        inference = model.unet(latent, t, mark(text, POSITIVE)).sample
    present = torch.ones(1, people, dtype=torch.bool)
    training.rule.begin(Identities(tokens[None], present, torch.ones(1, 1, 1)))
    with torch.no_grad(), Injection(model.unet, training.rule):
        training_output = model.unet(latent, t, mark(text, POSITIVE)).sample
    bare = model.unet(latent, t, text).sample
    assert (inference - bare).abs().max() > 1e-3
    assert (inference - training_output).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [2, 16])
def test_trained_lora_is_added_in_one_product_or_in_two(rank: int) -> None:
    """To narrow layers in one, for which the host's is not called; in half precision in two. The gradients are right,
    and nothing is kept from call to call."""
    torch.manual_seed(0)
    linear, pair = torch.nn.Linear(24, 40).requires_grad_(False), LowRank(24, 40, rank)
    torch.nn.init.normal_(pair.up.weight)
    called = []

    def host(x: torch.Tensor) -> torch.Tensor:
        called.append(len(x))
        return linear(x)

    fused, x, weights = FusedLinear(linear, pair, 0.5), torch.randn(2, 5, 24), (pair.down.weight, pair.up.weight)
    for _ in range(2):
        expected = x @ (linear.weight + 0.5 * pair.up.weight @ pair.down.weight).T + linear.bias
        made = fused(host, x, Call())
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
        wanted, found = (torch.autograd.grad(out.square().sum(), weights) for out in (expected, made))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            pair.up.weight.mul_(1.5)
    assert sum(called) == (0 if rank == 16 else 4)
    with torch.autocast("cpu", torch.bfloat16):
        fused(host, x, Call())
    assert sum(called) == (2 if rank == 16 else 6)


def test_files_have_the_published_layout(stages: tuple[Path, Path, Model]) -> None:
    faceid, router, model = stages
    from lib_portrait.attention.sites import find_sites
    from lib_portrait.checkpoints.formats import read_header

    adapter = Adapter.from_tensors(load_file(faceid), load_file(router))
    adapter.check_fits(find_sites(model.unet))
    assert adapter.has_router
    metadata = read_header(faceid)[1]
    assert metadata["backbone"] == "eyes.safetensors" and metadata["steps"] == "5"
    first, second = load_file(faceid), load_file(router)
    assert not any("router" in name or "faceid_proj" in name for name in first if "router" in name)
    assert {name.partition(".")[0] for name in second} == {"faceid_adapter"}


def test_stage_two_leaves_stage_one_as_it_is(stages: tuple[Path, Path, Model]) -> None:
    """Only router and LoRA are trained (sec. 3.4), the LoRA beginning as the first stage's and learning slowly."""
    faceid, router, _ = stages
    first, second = load_file(faceid), load_file(router)
    assert not any("to_k_faceid" in name or "faceid_proj" in name for name in second)
    lora = [name for name in second if "_lora.up" in name]
    moved = max(float((first[name].float() - second[name].float()).abs().max()) for name in lora)
    assert 0 < moved <= 5 * 5e-3 * 0.1 * 1.2


def test_the_base_model_is_not_trained(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    made = trained(monkeypatch, data, tmp_path / "run")
    for name, tensor in tiny_model().unet.state_dict().items():
        assert torch.equal(tensor, made.model.unet.state_dict()[name]), name
    assert "forward" not in made.model.unet.__dict__
    assert not any(name.startswith("model") for name in made.state_dict())


@pytest.mark.parametrize("identity", [False, True])
def test_gradient_checkpointing_changes_no_loss(
    monkeypatch: pytest.MonkeyPatch, data: Path, recognition: Path, finding: None, tmp_path: Path, identity: bool
) -> None:
    """The rule acts also when layers run a second time for the backward pass, with the same Gumbel noise."""
    trained(monkeypatch, data, tmp_path / "one")
    faceid = tmp_path / "one" / "export" / "uniportrait-faceid_tiny.safetensors"
    weight = ["--identity-weight", "0.5", "--recognition", str(recognition)] if identity else []
    runs = {}
    for checkpointing in (False, True):
        made = recipe(monkeypatch, data, "--stage", "2", "--faceid", str(faceid), *weight)
        run = tmp_path / f"checkpointing-{checkpointing}"
        settings = Settings(
            output=run, steps=4, batch=2, rate=1e-2, warmup=0, log_every=1, save_every=4, checkpointing=checkpointing
        )
        train(made, settings)
        runs[checkpointing] = [line["loss"] for line in losses(run)]
    assert np.allclose(runs[False], runs[True], rtol=1e-4)


def test_routing_loss_is_equation_4() -> None:
    """One site, one row, two people on a 2 x 2 latent, by hand: mean over the union of (softmax - M)^2 over people."""
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 5.0]]])
    regions = torch.zeros(1, 2, 2, 2)
    regions[0, 0, 0, 0] = regions[0, 1, 0, 1] = 1
    loss, right = routing_loss({7: logits}, regions, torch.ones(1, 2, dtype=torch.bool), (2, 2))
    wrong = float(torch.tensor(2.0).sigmoid())
    by_hand = ((0.5**2 + 0.5**2) + (wrong**2 + wrong**2)) / 2 / 2
    assert float(loss) == pytest.approx(by_hand, rel=1e-5)
    assert float(right) == pytest.approx(0.5)
    # A third place with nobody in it changes nothing.
    nobody = torch.full((1, 4, 1), -torch.inf)
    filled = torch.cat([logits, nobody], dim=-1).requires_grad_()
    regions, present = torch.cat([regions, torch.zeros(1, 1, 2, 2)], dim=1), torch.tensor([[True, True, False]])
    again, right = routing_loss({7: filled}, regions, present, (2, 2))
    assert float(again) == pytest.approx(by_hand, rel=1e-5) and float(right) == pytest.approx(0.5)
    again.backward()
    assert filled.grad is not None and filled.grad.isfinite().all() and not filled.grad[..., 2].any()


def test_stage_one_can_begin_with_another_runs_file(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    """Of the same sizes as it is; of greater rank as near as can be; of other sizes refused."""
    trained(monkeypatch, data, tmp_path)
    faceid = tmp_path / "export" / "uniportrait-faceid_tiny.safetensors"
    stored = {name: tensor.float() for name, tensor in load_file(faceid).items()}
    again = recipe(monkeypatch, data, "--initial", str(faceid)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    reduced = recipe(monkeypatch, data, "--initial", str(faceid), "--rank", "3").state_dict()
    ups = [name for name in stored if name.endswith("_lora.up.weight")]
    assert ups
    for up in ups:
        down = up.replace(".up.", ".down.")
        wanted = stored[up] @ stored[down]
        lost = torch.linalg.matrix_norm(reduced[up] @ reduced[down] - wanted)
        assert reduced[up].shape[1] == 3
        assert float(lost) == pytest.approx(float(torch.linalg.svdvals(wanted)[3]), rel=1e-3, abs=1e-6)
    assert torch.equal(reduced["faceid_proj.latents"], stored["faceid_proj.latents"])
    for size in (("--rank", "5"), ("--tokens", "5"), ("--depth", "3")):
        with pytest.raises(PortraitError, match="does not fit"):
            recipe(monkeypatch, data, "--initial", str(faceid), *size)


def test_faces_can_count_more_than_the_rest() -> None:
    """Face weight 3 on a box over two and a half of sixteen positions, worked out by hand."""
    record = FaceRecord("a", "woman", (16.0, 0.0, 56.0, 16.0), ((0.0, 0.0),) * 5)
    region = region_of(record, (64, 64), (4, 4))
    assert region.tolist() == [[0.0, 1.0, 1.0, 0.5], *[[0.0] * 4] * 3]
    squared = torch.zeros(1, 4, 4, 4)
    squared[:, :, 0, 1:] = 2.0
    assert face_weighted(squared, region[None], 0.0).item() == pytest.approx(2 * 3 / 16)
    assert face_weighted(squared, region[None], 3.0).item() == pytest.approx(2 * (4 + 4 + 2.5) / (16 + 3 * 2.5))


def test_structure_branch_is_dropped_as_in_the_paper(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    """0.33 the whole branch, 0.33 some of its tokens, 0.34 none; faces in 5 %."""
    made = recipe(monkeypatch, data)
    seen: dict[str, torch.Tensor] = {}

    def embedding(
        intrinsic: torch.Tensor, structure: torch.Tensor, beta: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        seen.update(intrinsic=intrinsic, beta=beta.flatten(), keep=keep)
        return torch.zeros(len(intrinsic), TOKENS, CONTEXT)

    monkeypatch.setattr(made.adapter.embedding, "forward", embedding)
    many = 6000
    batch = {"intrinsic": torch.ones(many, 1, 9, 24), "structure": torch.ones(many, 1, GRID, 40)}
    no_face = torch.arange(many) < 100
    made._embed(batch, no_face, Draws(0, 0, 0, many, slice(0, many), torch.device("cpu")))
    whole, partly = seen["beta"] == 0, ~seen["keep"].all(dim=1)
    assert float(whole.float().mean()) == pytest.approx(0.33, abs=0.02)
    assert float((partly & ~whole).float().mean()) == pytest.approx(0.33, abs=0.02)
    assert not (partly & whole).any()
    assert torch.equal((seen["intrinsic"] == 0).flatten(1).all(dim=1), no_face)
    made.dropping = False
    made._embed(batch, no_face, Draws(0, 0, 0, many, slice(0, many), torch.device("cpu")))
    assert (seen["beta"] == 1).all() and seen["keep"].all()


@pytest.mark.parametrize("ahead", [0.0, math.log(3)])
def test_positions_go_to_people_by_chance_as_their_logits_say(
    stages: tuple[Path, Path, Model], monkeypatch: pytest.MonkeyPatch, data: Path, ahead: float
) -> None:
    """Gumbel-softmax (sec. 3.3), straight through: with logits (0, a) a position goes wholly to the second person with
    probability e^a / (1 + e^a), anew at every position, row and site; the error reaches both people's logits."""
    made = recipe(monkeypatch, data, "--stage", "2", "--faceid", str(stages[0]))
    many, chosen, leaves = 64, [], []
    # All ID tokens of a person alike: what a position attends to is then that person's value, whatever its query.
    tokens = torch.randn(2, 1, CONTEXT).expand(2, TOKENS, CONTEXT)
    added = BatchRule.added

    def route(hidden: torch.Tensor, theta: object, router_keys: torch.Tensor) -> torch.Tensor:
        assert router_keys.shape[:2] == (many, 2)
        leaves.append(torch.tensor([0.0, ahead]).expand(many, hidden.shape[1], 2).clone().requires_grad_())
        return leaves[-1]

    def attending(rule, site, call, hidden, q):  # type: ignore[no-untyped-def]
        attended = added(rule, site, call, hidden, q)
        first, second = (rule.adapter.faceid_at(site).to_v_faceid(own[0]) for own in tokens)
        share = ((attended - first) * (second - first)).sum(dim=-1) / (second - first).square().sum()
        torch.testing.assert_close(attended, torch.lerp(first, second, share[..., None]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(share, share.round(), rtol=0, atol=1e-4)
        chosen.append(share.detach().round())
        return attended

    monkeypatch.setattr("lib_portrait.methods.uniportrait.routing_logits", route)
    monkeypatch.setattr(BatchRule, "added", attending)
    monkeypatch.setattr(made, "_embed", lambda batch, no_face, draws: tokens.expand(many, *tokens.shape))
    batch = {name: tensor.expand(many, *tensor.shape) for name, tensor in made.data[0, (0, 0, 0)].items()}
    batch = {**batch, "regions": batch["regions"][:, :2], "present": torch.ones(many, 2, dtype=torch.bool)}
    device = torch.device("cpu")
    with Injection(made.model.unet, made.rule) as injection:
        made.injections = (injection,)
        made.train()
        made(batch, Draws(0, 0, 0, many, slice(0, many), device))["diffusion"].backward()
        drawn = torch.cat([share.flatten() for share in chosen])
        expected = 1 / (1 + math.exp(-ahead))
        deviation = math.sqrt(expected * (1 - expected) / len(drawn))
        assert float(drawn.mean()) == pytest.approx(expected, abs=4 * deviation)
        assert all(not torch.equal(share[0], share[1]) for share in chosen)
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(chosen, 2))
        for leaf, share in zip(leaves, chosen, strict=True):
            assert leaf.grad is not None
            second = share == 1
            losing = torch.stack([second, ~second], dim=-1)
            assert (leaf.grad[losing] != 0).float().mean() > 0.99
            # The gradient of soft shares that add up to one: what one logit gains, the other loses.
            torch.testing.assert_close(leaf.grad.sum(dim=-1), torch.zeros_like(share), rtol=0, atol=1e-7)

        chosen.clear()
        made.eval()
        with torch.no_grad():
            made(batch, Draws(0, 0, 0, many, slice(0, many), device))
        assert all((share == (ahead > 0)).all() for share in chosen), "not in training: the likeliest person's"


def test_captions_and_faces_are_dropped_each_in_five_percent(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    """One without regard to the other; a caption that is not dropped stays as it is."""
    made, many = recipe(monkeypatch, data), 20000
    seen: dict[str, torch.Tensor] = {}

    def embed(batch, no_face, draws):  # type: ignore[no-untyped-def]
        seen["no_face"] = no_face
        return torch.zeros(many, 1, TOKENS, CONTEXT)

    def predict(noisy, t, cond, noise):  # type: ignore[no-untyped-def]
        seen["captions"] = cond.caption_ids
        return noisy, {}

    monkeypatch.setattr(made, "_embed", embed)
    monkeypatch.setattr(made, "_predict", predict)
    batch = {name: tensor.expand(many, *tensor.shape) for name, tensor in made.data[0, (0, 0, 0)].items()}
    captions = torch.randint(1000, 40000, (many, 77))
    made({**batch, "caption_ids": captions}, Draws(0, 0, 0, many, slice(0, many), torch.device("cpu")))
    no_caption = (seen["captions"] == uncaptioned(captions)).all(dim=1)
    assert torch.equal(seen["captions"][~no_caption], captions[~no_caption])
    for dropped in (no_caption, seen["no_face"]):
        assert float(dropped.float().mean()) == pytest.approx(0.05, abs=0.006)
    both = float((no_caption & seen["no_face"]).float().mean())
    assert both == pytest.approx(0.05 * 0.05, abs=0.0014), "four standard errors of what chance gives"


def test_another_photo_of_the_same_person_feeds_the_intrinsic_branch(
    monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    made = recipe(monkeypatch, data)
    samples = made.data
    own = samples.features.face(0, 0)[0].float()
    of_this_person = [samples.features.face(f.sample, f.face)[0].float() for f in samples.photos["name 0"]]
    others = 0
    for draw in range(400):
        sample = samples[0, (0, draw, 0)]
        assert torch.equal(sample["structure"][0], samples.features.face(0, 0)[1].float())
        if not torch.equal(sample["intrinsic"][0], own):
            others += 1
            assert any(torch.equal(sample["intrinsic"][0], photo) for photo in of_this_person)
    assert 20 <= others <= 62


def identity_tokens(faceid: Path, structure: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)
    embedding = Adapter.from_tensors(load_file(faceid), None).embedding.float()
    return embedding(torch.randn(1, 9, 24), structure)


def test_an_ablation_leaves_a_part_out_of_its_file_too(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    """Table 3: inference gives a variant all features, and its file makes nothing of those it was trained without."""
    torch.manual_seed(6)
    structure = torch.randn(1, GRID, 40)
    no_shallow, no_clip = structure.clone(), structure.clone()
    no_shallow[..., :SHALLOW] = torch.randn(1, GRID, SHALLOW)
    no_clip[..., SHALLOW:] = torch.randn(1, GRID, 40 - SHALLOW)
    reads = {"local": (False, False), "structure": (False, True), "shallow": (True, True)}
    for components, (reads_shallow, reads_clip) in reads.items():
        trained(monkeypatch, data, tmp_path / components, "--components", components)
        faceid = tmp_path / components / "export" / "uniportrait-faceid_tiny.safetensors"
        tokens = identity_tokens(faceid, structure)
        assert (not torch.equal(tokens, identity_tokens(faceid, no_shallow))) == reads_shallow, components
        assert (not torch.equal(tokens, identity_tokens(faceid, no_clip))) == reads_clip, components


@pytest.fixture
def finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that finds a face in the middle of the 8 x 8 pixels that the tiny model draws."""
    face = Face(np.array([2, 2, 6, 6], np.float32), (template(4) + 2).astype(np.float32), 1.0)
    found = Detector("middle", "1", lambda image: [face])
    monkeypatch.setattr(uniportrait, "open_detector", lambda choice, models: found)


def test_the_identity_loss_is_added_and_its_drawing_leaves_the_rest_as_it_is(
    monkeypatch: pytest.MonkeyPatch, data: Path, recognition: Path, finding: None, tmp_path: Path
) -> None:
    weight, network = ("--identity-weight", "0.5"), ("--recognition", str(recognition))
    trained(monkeypatch, data, tmp_path / "without")
    made = trained(monkeypatch, data, tmp_path / "with", *network, *weight)
    with_loss, without = losses(tmp_path / "with"), losses(tmp_path / "without")
    for line in with_loss:
        assert line["loss"] == pytest.approx(line["diffusion"] + 0.5 * (line["id_loss"] + line["infonce"]), rel=1e-4)
        assert line["id_loss"] > 0 and line["infonce"] > 0 and line["faces_found"] == 1
    assert with_loss[0]["diffusion"] == pytest.approx(without[0]["diffusion"], rel=1e-4)
    assert apart(tmp_path / "with", tmp_path / "without") > 1e-3, "it is learned from"

    many, seen = 400, []
    batch = {name: tensor.expand(many, *tensor.shape) for name, tensor in made.data[0, (0, 0, 0)].items()}
    monkeypatch.setattr(uniportrait, "SHARE", 1.0)
    monkeypatch.setattr(made, "_predict", lambda noisy, *rest: (seen.append(len(noisy)) or noisy, {}))
    made._frozen["identity loss"] = lambda picture, people, present, who: FaceLosses(
        *[picture.mean()] * 3, found=torch.tensor(len(people) / many)
    )
    with torch.no_grad():
        asked = made(batch, Draws(0, 0, 0, many, slice(0, many), torch.device("cpu")))["faces_found"]
    assert 0.9 < asked < 1, "faces are dropped in 5 % of the samples, which are not drawn then"
    assert seen[-1] == many + round(float(asked) * many), "the last step goes with the other loss's rows"


def test_stage_two_can_have_the_identity_loss_and_another_runs_router(
    stages: tuple[Path, Path, Model],
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
    recognition: Path,
    finding: None,
    tmp_path: Path,
) -> None:
    faceid, router, _ = stages
    second = ("--stage", "2", "--faceid", str(faceid), "--initial", str(router))
    begun = recipe(monkeypatch, data, *second).state_dict()
    for name, tensor in begun.items():
        source = load_file(router if "_router." in name else faceid)
        assert torch.equal(tensor, source[name].float()), name
    with pytest.raises(PortraitError, match="not those of a router file"):
        recipe(monkeypatch, data, *second[:4], "--initial", str(faceid))

    lacking = load_file(router)
    lacking.pop(next(name for name in lacking if name.endswith("aggr_router.weight")))
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(PortraitError, match="router is of another model"):
        recipe(monkeypatch, data, *second[:4], "--initial", str(tmp_path / "lacking.safetensors"))

    weight = ("--identity-weight", "0.5", "--recognition", str(recognition))
    trained(monkeypatch, data, tmp_path / "with", *second, *weight)
    trained(monkeypatch, data, tmp_path / "without", *second)
    with_loss, without = losses(tmp_path / "with"), losses(tmp_path / "without")
    for name in ("diffusion", "route"):
        assert with_loss[0][name] == pytest.approx(without[0][name], rel=0.02), "but for the Gumbel noise the same"
    assert apart(tmp_path / "with", tmp_path / "without") > 1e-3, "it is learned from"
    for line in with_loss:
        whole = line["diffusion"] + 0.1 * line["route"] + 0.5 * (line["id_loss"] + line["infonce"])
        assert line["loss"] == pytest.approx(whole, rel=1e-4)
        assert line["id_loss"] > 0 and 0 < line["faces_found"] <= 0.5, "one face is found, of two to four people"


def test_the_error_is_of_what_the_checkpoint_predicts_on_its_own_schedule(
    monkeypatch: pytest.MonkeyPatch, data: Path, recognition: Path, finding: None
) -> None:
    """A checkpoint whose .yaml says v, and other betas: a UNet that predicts v rightly has no error."""
    config = copy.deepcopy(layout.SD1)
    config["model"]["params"] |= {"parameterization": "v", "linear_start": 0.0005, "linear_end": 0.02}
    own = replace(tiny_model(), config=config)
    schedule = NoiseSchedule({"beta_start": 0.0005, "beta_end": 0.02, "prediction_type": "v_prediction"})
    weight = ("--identity-weight", "0.5", "--recognition", str(recognition))
    made = recipe(monkeypatch, data, *weight, model=own)
    batch = {name: tensor[None] for name, tensor in made.data[0, (0, 0, 0)].items()}
    pictures: list[torch.Tensor] = []

    def rightly(noisy, t, cond, noise=None):  # type: ignore[no-untyped-def]
        latent = batch["latent"].expand_as(noisy)
        abar = schedule.alphas_bar[t][:, None, None, None]
        noise = (noisy - abar.sqrt() * latent) / (1 - abar).sqrt()
        return schedule.target(latent, noise, t), {}

    def seen(picture, *others):  # type: ignore[no-untyped-def]
        pictures.append(picture)
        return FaceLosses(*[picture.new_zeros(())] * 4)

    monkeypatch.setattr(made, "_predict", rightly)
    made._frozen["identity loss"] = seen
    monkeypatch.setattr(uniportrait, "FACES_DROPPED", -1.0)
    losses = made(batch, Draws(0, 3, 0, 1, slice(1), torch.device("cpu")))
    assert losses["diffusion"] < 1e-8
    (picture,) = pictures
    assert torch.allclose(picture, batch["latent"], atol=1e-3), "what the identity loss sees is the picture"


@pytest.mark.parametrize("beta", [0.1, 0.8])
def test_what_is_drawn_for_the_identity_loss_is_what_inference_draws(
    beta: float, monkeypatch: pytest.MonkeyPatch, data: Path, recognition: Path, finding: None, tmp_path: Path
) -> None:
    trained(monkeypatch, data, tmp_path / "one", "--backbone", "eyes.safetensors")
    faceid = tmp_path / "one" / "export" / "uniportrait-faceid_tiny.safetensors"
    made = recipe(monkeypatch, data, "--identity-weight", "0.5", "--recognition", str(recognition))
    half_stored(made, [faceid])
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def one_step(noise, last, steps, schedule, predict):  # type: ignore[no-untyped-def]
        asked.append((noise, last, predict(noise, last)))
        return noise

    monkeypatch.setattr(uniportrait, "ddim_sample", one_step)
    batch = {name: tensor[None] for name, tensor in made.data[0, (0, 0, 0)].items()}
    adapter = Adapter.from_tensors(load_file(faceid), None)
    monkeypatch.setattr(Draws, "rand", lambda self, *shape: torch.full((1, *shape), beta))
    embed, zero = adapter.embedding.float(), made.zero_structure.float()[None]
    of_person = embed(batch["intrinsic"][0], batch["structure"][0], beta)[0]
    of_nobody = embed(torch.zeros_like(batch["intrinsic"][0]), zero, beta)[0]
    person = Person({POSITIVE: of_person, NEGATIVE: of_nobody}, scale=PortraitRequest().options["scale"])
    empty = torch.full_like(batch["caption_ids"], 49407)
    empty[:, 0] = 49406
    model, guidance = made.model, Sampling("").guidance
    with torch.no_grad():
        with Injection(model.unet, made.rule) as injection:
            made.injections = (injection,)
            made._sample(
                batch,
                batch["caption_ids"],
                torch.ones(1, dtype=torch.bool),
                Draws(0, 0, 0, 1, slice(1), torch.device("cpu")),
            )
        ((noise, last, predicted),) = asked
        text, no_text = (model.text_encoder(ids).last_hidden_state for ids in (batch["caption_ids"], empty))
        with Injection(model.unet, UniPortraitRule(adapter, [person])):
            cond = model.unet(noise, last, mark(text, POSITIVE)).sample
            uncond = model.unet(noise, last, mark(no_text, NEGATIVE)).sample
        bare = model.unet(noise, last, text).sample
    assert (cond - bare).abs().max() > 1e-3
    assert (uncond + guidance * (cond - uncond) - predicted).abs().max() < 1e-4


def test_people_have_numbers_by_which_others_are_told_from_them(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    """Everybody is among the others once, by a face of theirs; without labels every face is a person of its own."""
    people = PortraitDataset(Shards.under(data), 1.0, (1, 4))
    name_of: dict[int, str] = {}
    for place, group in enumerate(people.pictures):
        who = people[place, (0, 0, 0)]["who"].tolist()
        assert who[len(group) :] == [-1] * (4 - len(group))
        for face, number in zip(group, who, strict=False):
            assert name_of.setdefault(number, str(face.record.id)) == face.record.id
    assert len(name_of) == len(set(name_of.values())) == 3
    faces, numbers = people.distinct_faces(1000)
    assert sorted(numbers.tolist()) == sorted(name_of)
    for own, number in zip(faces, numbers.tolist(), strict=True):
        theirs = [place for place in people.features.faces if f"name {sum(place) % 3}" == name_of[number]]
        assert any(torch.equal(own, people.features.face(*place)[0].float()) for place in theirs)
    assert len(people.distinct_faces(2)[1]) == 2

    found, unreadable = faces_of(Shards.under(data))
    nobody_knows = [replace(face, record=replace(face.record, id=None)) for face in found]
    monkeypatch.setattr(portraits, "faces_of", lambda shards: (nobody_knows, unreadable))
    _, numbers = PortraitDataset(Shards.under(data), 1.0, (1, 4)).distinct_faces(1000)
    assert len(set(numbers.tolist())) == len(found)


def test_stage_two_takes_the_face_networks_from_its_faceid_file(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    for unread in (("--backbone", "a.safetensors"), ("--vision", "a.safetensors")):
        with pytest.raises(PortraitError, match="nothing here reads it.*the file of --faceid names it"):
            recipe(monkeypatch, data, "--stage", "2", "--faceid", "b.safetensors", *unread)


@pytest.mark.parametrize("unread", [("--route-weight", "0"), ("--lora-rate", "0.1"), ("--faceid", "a.safetensors")])
def test_stage_one_refuses_what_only_stage_two_reads(
    monkeypatch: pytest.MonkeyPatch, data: Path, unread: tuple[str, str]
) -> None:
    with pytest.raises(PortraitError, match="nothing here reads it.*--stage 2"):
        recipe(monkeypatch, data, *unread)


def test_the_identity_loss_is_refused_where_it_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, data: Path, recognition: Path, tmp_path: Path
) -> None:
    weight, network = ("--identity-weight", "0.5"), ("--recognition", str(recognition))
    with pytest.raises(PortraitError, match="--recognition"):
        recipe(monkeypatch, data, *weight)
    with pytest.raises(PortraitError, match="nothing here reads it"):
        recipe(monkeypatch, data, *network)
    with pytest.raises(PortraitError, match="without global"):
        recipe(monkeypatch, data, *network, *weight, "--components", "global")
    save_file(recognition_network(8).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(PortraitError, match="another network than other.safetensors"):
        recipe(monkeypatch, data, "--recognition", str(tmp_path / "other.safetensors"), *weight)
    for unread in (("--detector", "mtcnn"), ("--last-below", "500")):
        with pytest.raises(PortraitError, match="nothing here reads it.*--identity-weight"):
            recipe(monkeypatch, data, *unread)
    for t in ("0", "1001"):
        with pytest.raises(PortraitError, match="1 to 1000"):
            recipe(monkeypatch, data, *network, *weight, "--last-below", t)


def test_the_global_feature_is_the_recognition_networks_own(
    monkeypatch: pytest.MonkeyPatch, data: Path, recognition: Path, tmp_path: Path
) -> None:
    backbone = recognition_network()
    face = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        embedding, taps = backbone(face)
    tokens = taps[-1][0].flatten(1).T
    assert torch.allclose(global_feature(backbone, tokens[None]), embedding, atol=1e-6)
    arguments = ("--components", "global", "--recognition", str(recognition))
    trained(monkeypatch, data, tmp_path / "run", *arguments)
    made = load_file(tmp_path / "run" / "export" / "uniportrait-faceid_tiny.safetensors")
    assert made["faceid_proj.proj_id.0.weight"].shape[1] == 20
