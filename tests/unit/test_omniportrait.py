"""OmniPortrait's Pivot ID Encoder against its equations, on all layouts: words and whose they are, e_mix, L_loc."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, Row, find_sites, mark, spatial_shape
from lib_portrait.attention.rows import word_positions
from lib_portrait.checkpoints.store import Folders, Store
from lib_portrait.conditioning import Conditioner
from lib_portrait.errors import PortraitError
from lib_portrait.faces import FaceService
from lib_portrait.faces.features import PictureEncoder
from lib_portrait.faces.vision import image_tower_from_state_dict
from lib_portrait.methods.base import Placement, with_words
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.methods.omniportrait import (
    METHOD,
    WORDS,
    OmniPortraitRule,
    PivotEncoder,
    PivotIdentity,
    localization_loss,
    localized_sites,
    shared_out,
)
from lib_portrait.request import Identity, Photo, PortraitRequest
from lib_portrait.standalone.host import encode_prompts
from lib_portrait.standalone.sampling import Sampling, sample
from tests.parity.unets import diffusers_unet, ldm_unet, sgm_unet
from tests.small_networks import small_model
from tests.unit.test_attention import attributes

LAYOUTS: dict[str, Callable[[], nn.Module]] = {"diffusers": diffusers_unet, "ldm": ldm_unet, "sgm": sgm_unet}
E, D = 6, 48


@pytest.fixture(scope="module", params=LAYOUTS)
def unet(request: pytest.FixtureRequest) -> nn.Module:
    return LAYOUTS[request.param]().requires_grad_(False)


def run(unet: nn.Module, x: Tensor, context: Tensor, t: float = 500) -> Tensor:
    more = {"y": torch.linspace(-1, 1, 8).expand(len(x), 8)} if hasattr(unet, "label_emb") else {}
    out = unet(x, torch.full((len(x),), t), context, **more)
    return out if isinstance(out, Tensor) else out.sample


def text(rows: int, tokens: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, D, generator=torch.Generator().manual_seed(seed))


def latents(rows: int, side: int = 16) -> Tensor:
    return torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(1))


def adapter(image: int = E) -> PivotEncoder:
    torch.manual_seed(5)
    made = PivotEncoder(image, D).requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def people(number: int, **own: Any) -> list[PivotIdentity]:
    generator = torch.Generator().manual_seed(7)
    return [PivotIdentity(torch.randn(E, generator=generator), **own) for _ in range(number)]


class Words:
    """A host that splits prompts at spaces behind one token of its own; what begins with + is emphasised twofold."""

    def positions(self, prompt: str, word: str) -> tuple[tuple[int, ...], ...]:
        words = ["<", *(one.strip("+") for one in prompt.split())]
        return word_positions(words, word.split())

    def emphasis(self, prompt: str) -> tuple[float, ...]:
        return (1.0, *(2.0 if one.startswith("+") else 1.0 for one in prompt.split()))


HOST: Any = Words()


# ----------------------------------------------------------------------------------------------------------- the layer


def test_a_new_layer_leaves_the_texts_embedding_as_it_is_and_looks_at_the_picture_once_trained() -> None:
    made, e_txt = PivotEncoder(E, D), text(2)
    assert torch.equal(made(torch.randn(2, 9, E), e_txt), e_txt)
    assert (made.image, made.text) == (E, D)
    made(torch.randn(E).expand(2, 9, E), e_txt).sum().backward()
    assert made.projection.weight.grad[:, :E].abs().min() > 0


@pytest.mark.parametrize("weight", [0.5, 1.0, 1.3])
def test_e_mix_is_the_linear_layer_of_both_embeddings_and_emphasised_as_the_host_would_have(weight: float) -> None:
    made, e_ref, e_txt = adapter(), torch.randn(E), torch.randn(D)
    linear = made.projection.weight @ torch.cat([e_ref, e_txt]) + made.projection.bias
    torch.testing.assert_close(made(e_ref, weight * e_txt, weight), weight * linear, atol=1e-5, rtol=1e-5)


def test_files_come_back_and_foreign_ones_are_refused() -> None:
    made = adapter()
    tensors = {name: value.half() for name, value in made.state_dict().items()}
    again = PivotEncoder.from_tensors(tensors)
    assert torch.equal(again.projection.weight, tensors["projection.weight"].float())
    assert not again.projection.weight.requires_grad
    for wrong, why in (
        ({"0.to_k_face.weight": torch.zeros(2, 2)}, "0.to_k_face.weight, not OmniPortrait's one layer"),
        ({}, "it holds nothing"),
        ({**tensors, "more": torch.zeros(1)}, "more"),
        ({**tensors, "projection.weight": torch.zeros(48, 48)}, "there is no picture"),
        ({**tensors, "projection.weight": torch.zeros(48)}, "shape"),
        ({**tensors, "projection.bias": torch.zeros(47)}, "projection.bias has the shape"),
        ({**tensors, "projection.bias": torch.full((48,), torch.inf)}, "infinities or NaN"),
        ({**tensors, "projection.bias": torch.zeros(48, dtype=torch.int32)}, "int32"),
    ):
        with pytest.raises(PortraitError, match=why):
            PivotEncoder.from_tensors(wrong, "omniportrait_x.safetensors")


def test_a_model_with_other_contexts_is_refused(unet: nn.Module) -> None:
    sites = find_sites(unet)
    METHOD.check_fits(adapter(), sites)
    assert METHOD.feature_widths(adapter()) == {"image": E}
    with pytest.raises(PortraitError, match="contexts of width 47, the loaded model has 48"):
        METHOD.check_fits(PivotEncoder(E, 47), sites)


def test_of_several_photos_the_mean_is_taken_and_options_reach_the_person() -> None:
    references = tuple(SimpleNamespace(features=SimpleNamespace(image=torch.full((E,), float(i)))) for i in (1, 4))
    own = {"strength": 0.5, "word": "Ada"}
    placement = Placement((0.0, 0.0, 0.5, 1.0), 0.1, 0.9)
    person = METHOD.encode(adapter(), SimpleNamespace(references=references), {}, own, placement)  # type: ignore[arg-type]
    assert torch.equal(person.e_ref, torch.full((E,), 2.5))
    assert (person.word, person.strength, person.region, person.start, person.end) == (
        "Ada",
        0.5,
        *vars(placement).values(),
    )


# ---------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("own", "prompts", "expected"),
    [
        # One person has the first word, wherever it stands, and no other.
        ([""], ["a woman in a hat the woman smiles at a man"], [[(0, 2), (0, 7)]]),
        ([""], ["people laugh"], [[(0, 1)]]),
        # One word each, in the prompt's order; what comes again is of whoever has the word.
        (["", ""], ["a man and a woman the man smiles"], [[(0, 2), (0, 7)], [(0, 5)]]),
        (["", ""], ["a girl , a boy and a person"], [[(0, 2)], [(0, 5)]]),
        # Where there are fewer words than people, one time each; later ones are of whoever alone has the word.
        (["", ""], ["a woman and a woman"], [[(0, 2)], [(0, 5)]]),
        (["", "", ""], ["man woman woman man woman"], [[(0, 1), (0, 4)], [(0, 2)], [(0, 3)]]),
        (["", ""], ["two women"], [[(0, 2)], []]),
        # AND: over all prompts of the picture.
        (["", ""], ["a man left", "a woman right", "the man"], [[(0, 2), (2, 2)], [(1, 2)]]),
        (["", ""], ["a hall", "a woman", "another woman"], [[(1, 2)], [(2, 2)]]),
        # Words of their own, also several, also within another; others do not get what is taken.
        (["ada", ""], ["a woman and ada with a man"], [[(0, 4)], [(0, 2)]]),
        (["old woman", ""], ["an old woman and a woman"], [[(0, 2), (0, 3)], [(0, 6)]]),
        (["", "woman"], ["a woman and a man and a woman"], [[(0, 5)], [(0, 2), (0, 8)]]),
        (["knight", "knight", ""], ["knight and knight and man"], [[(0, 1)], [(0, 3)], [(0, 5)]]),
        (["knight", "knight"], ["a knight"], [[(0, 2)], []]),
        (["ada"], ["a woman"], [[]]),
        ([""], ["a womanly hat"], [[]]),
    ],
)
def test_whose_word_is_whose(own: list[str], prompts: list[str], expected: list[list[tuple[int, int]]]) -> None:
    found = {
        word: [(i, place) for i, prompt in enumerate(prompts) for place in HOST.positions(prompt, word)]
        for word in {*WORDS, *filter(None, own)}
    }
    places = [[(i, at) for i, positions in own for at in positions] for own in shared_out(own, found)]
    assert places == expected
    rule = OmniPortraitRule(adapter(), [PivotIdentity(torch.zeros(E), word=word.title()) for word in own])
    told = rule.words(HOST, prompts)
    again = [[(i, at) for i, of_prompt in enumerate(told) for at in of_prompt[person]] for person in range(len(own))]
    assert again == expected


def test_who_has_no_word_is_named_with_what_to_do() -> None:
    rule = OmniPortraitRule(adapter(), people(2))

    def check(*stages: Sequence[str]) -> None:
        rule.check_words([rule.words(HOST, prompts) for prompts in stages])

    check(["a man and a woman"])
    check(["a hall"], ["a man and a woman"])
    check(["a man"], ["a woman and a boy"])
    with pytest.raises(PortraitError, match="no word for identity 1 of 2.*woman, man, girl.*word") as caught:
        check(["a hall"])
    assert caught.value.field == "prompt"
    with pytest.raises(PortraitError, match="identity 2 of 2"):
        check(["a woman"], ["two women"])
    OmniPortraitRule(adapter(), people(1, strength=0.0)).check_words([[((),)]])
    named = OmniPortraitRule(adapter(), [*people(1), *people(1, word="Ada")])
    with pytest.raises(PortraitError, match="'Ada' does not stand in the prompt") as caught:
        named.check_words([named.words(HOST, ["a woman and a man"])])
    assert caught.value.field == "identities[1].word"


# ------------------------------------------------------------------------------------------------- e_mix in its place


def told_rows(rule: OmniPortraitRule, prompts: Sequence[str], ahead: int = 0) -> list[Row]:
    lengths = [(prompt, len(HOST.emphasis(prompt)) + ahead) for prompt in prompts]
    return with_words(rule, HOST, [Row(POSITIVE)] * len(prompts), lengths)


@pytest.mark.parametrize(
    ("number", "prompt", "ahead"),
    [
        (1, "a woman in a hat and +woman here", 0),
        (2, "a man and a +woman the man sits", 0),
        (3, "man woman girl and a man there too", 1),
    ],
)
def test_the_context_is_replaced_exactly_at_the_words(unet: nn.Module, number: int, prompt: str, ahead: int) -> None:
    rule = OmniPortraitRule(adapter(), people(number))
    (row,) = told_rows(rule, [prompt], ahead)
    assert row.ahead == ahead and len(row.words) == number and all(row.words)
    table = {1: row, 2: Row(NEGATIVE, words=row.words, weights=row.weights)}
    x, context = latents(2), text(2, 9 + ahead)
    expected, weights = context.clone(), HOST.emphasis(prompt)
    for person, words in zip(rule.people, row.words):
        for place in words:
            e_txt = context[0, place + ahead] / weights[place]
            linear = rule.adapter.projection.weight @ torch.cat([person.e_ref, e_txt]) + rule.adapter.projection.bias
            expected[0, place + ahead] = weights[place] * linear
    changed = (expected != context).any(dim=2)
    assert changed.sum() == sum(map(len, row.words)) and not changed[1].any()
    with torch.no_grad(), Injection(unet, rule, rows=table):
        found = run(unet, x, mark(context, [1, 2]))
    with torch.no_grad():
        plain, bare = run(unet, x, expected), run(unet, x, context)
    assert (found - plain).abs().max() < 1e-5
    assert torch.equal(found[1], bare[1]) and (found[0] - bare[0]).abs().max() > 1e-3
    assert rule.drawn == set(range(number))


def test_strengths_windows_and_rows_without_a_word() -> None:
    unet = ldm_unet().requires_grad_(False)
    first, second = people(2)
    rule = OmniPortraitRule(
        adapter(), [PivotIdentity(first.e_ref, strength=0.25), PivotIdentity(second.e_ref, start=0.5)]
    )
    rows = told_rows(rule, ["man woman", "no one there"])
    context = text(2, 5)
    injection = Injection(unet, rule, rows=dict(enumerate(rows, 1)))
    seen = []
    unet.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    with torch.no_grad(), injection:
        for injection.progress in (0.0, 0.5):
            run(unet, latents(2), mark(context, [1, 2]))
    e_mix = [rule.adapter(one.e_ref, context[0, place]) for place, one in ((1, first), (2, second))]
    for number, late in ((0, False), (1, True)):
        expected = context.clone()
        expected[0, 1] = 0.75 * context[0, 1] + 0.25 * e_mix[0]
        if late:
            expected[0, 2] = e_mix[1]
        torch.testing.assert_close(seen[number], expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(seen[number][1], context[1])
    assert rule.drawn == {0, 1}
    none = OmniPortraitRule(adapter(), people(1, strength=0.0))
    with torch.no_grad(), Injection(unet, none, rows=dict(enumerate(told_rows(none, ["woman", "woman"]), 1))):
        run(unet, latents(2), mark(context, [1, 2]))
    assert torch.equal(seen[-1], context) and not none.drawn


def test_nothing_is_left_behind(unet: nn.Module) -> None:
    before = attributes(unet)
    rule = OmniPortraitRule(adapter(), people(1), watched=[site.index for site in find_sites(unet) if site.cross])
    rows = {1: Row(POSITIVE, words=((2,),))}
    with torch.no_grad(), Injection(unet, rule, rows=rows):
        run(unet, latents(1), mark(text(1), 1))
    assert attributes(unet) == before


def test_half_precision_contexts_stay_so() -> None:
    rule = OmniPortraitRule(adapter(), people(1))
    call: Any = SimpleNamespace(rows=[Row(POSITIVE, words=((1,),))], progress=0.0)
    context = text(1).bfloat16()
    out = rule.context(call, context)
    assert out.dtype == torch.bfloat16 and rule.adapter.projection.weight.dtype == torch.float32
    expected = rule.adapter(rule.people[0].e_ref, context[0, 1].float()).bfloat16()
    assert torch.equal(out[0, 1], expected) and torch.equal(out[0, 2:], context[0, 2:])


# ------------------------------------------------------------------------------------------------------------- training


def test_the_localization_loss_is_equation_5() -> None:
    attention, masks = torch.rand(2, 16), (torch.rand(2, 8, 8) > 0.5)
    found = localization_loss(attention, masks, (4, 4))
    for row in range(2):
        total = 0.0
        for i in range(4):
            for j in range(4):
                m = masks[row, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].float().mean()
                total += float((attention[row, 4 * i + j] - m) ** 2)
        assert found[row] == pytest.approx(total / 16, abs=1e-6)


def test_the_level_nearest_to_16_by_16_is_held_to_the_face(unet: nn.Module) -> None:
    sites = find_sites(unet)

    def level(latent: int) -> set[int]:
        seen: dict[int, tuple[int, int]] = {}
        handles = []
        for site in sites:

            def keep(module: nn.Module, args: Any, kwargs: Any, site: Any = site) -> None:
                seen[site.index] = spatial_shape(site.arguments(args, kwargs)[0].shape[1], (latent, latent))

            handles.append(site.module.register_forward_pre_hook(keep, with_kwargs=True))
        with torch.no_grad():
            run(unet, latents(1, latent), text(1))
        for handle in handles:
            handle.remove()
        chosen = localized_sites(sites, seen)
        assert all(site.cross for site in sites if site.index in chosen)
        return {seen[index][0] for index in chosen}

    assert level(16) == {16} and level(32) == {16} and level(8) == {8}
    two: Any = [SimpleNamespace(index=1, cross=True), SimpleNamespace(index=3, cross=True)]
    assert localized_sites(two, {1: (16, 8), 3: (32, 16)}) == [3], "of two as near the finer one"


def test_gradients_reach_the_layer_alone_and_by_both_losses(unet: nn.Module) -> None:
    made = adapter().requires_grad_(True)
    cross = [site.index for site in find_sites(unet) if site.cross][:2]
    rule = OmniPortraitRule(made, [PivotIdentity(torch.randn(2, E))], watched=cross)
    rows = {1: Row(POSITIVE, words=((2,),)), 2: Row(POSITIVE, words=((3, 5),))}
    context = text(2)
    grads = []
    for loss in ("diffusion", "location"):
        made.zero_grad()
        with Injection(unet, rule, rows=rows):
            out = run(unet, latents(2), mark(context, [1, 2]))
        assert set(rule.attention) == set(cross)
        first = rule.attention[cross[0]]
        assert first.shape == (2, 256) and first.min() > 0 and first.max() < 1
        located = localization_loss(first, torch.ones(2, 16, 16), (16, 16)).mean()
        (out.square().mean() if loss == "diffusion" else located).backward()
        grads.append(made.projection.weight.grad.clone())
    assert all(one.abs().max() > 0 for one in grads)
    assert all(parameter.grad is None for parameter in unet.parameters())
    # Each row has its own picture and its own place.
    expected = context.clone()
    for row, places in enumerate(((2,), (3, 5))):
        expected[row, list(places)] = made(
            rule.people[0].e_ref[row].expand(len(places), -1), context[row, list(places)]
        )
    with torch.no_grad():
        assert (out - run(unet, latents(2), expected)).abs().max() < 1e-5


# -------------------------------------------------------------------------------------------------------- image encoder


def clip(width: int = 64, projected: int = 24, **config: Any) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(2)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "patch_size": 56}
    heads = max(1, width // 64)
    whole = CLIPVisionConfig(**sizes, num_attention_heads=heads, projection_dim=projected, hidden_act="gelu", **config)
    model = CLIPVisionModelWithProjection(whole).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight") or name.endswith("bias"):
            tensor.normal_(1 if name.endswith("weight") else 0, 0.2)
    return model


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_the_embedding_is_transformers_own() -> None:
    from lib_portrait.faces.features import CLIP_MEAN, CLIP_STD

    model, pixels = clip(), torch.rand(2, 3, 224, 224)
    tower = image_tower_from_state_dict(model.state_dict())
    expected = model(pixel_values=normalised(pixels, CLIP_MEAN, CLIP_STD)).image_embeds
    torch.testing.assert_close(tower.embedding(pixels), expected, atol=1e-5, rtol=1e-5)
    assert tower.projected == 24


def test_vit_l_14_of_laion_2b_sees_pixels_between_minus_one_and_one() -> None:
    model, pixels = clip(1024, 8), torch.rand(1, 3, 224, 224)
    tower = image_tower_from_state_dict(model.state_dict())
    expected = model(pixel_values=pixels * 2 - 1).image_embeds
    torch.testing.assert_close(tower.embedding(pixels), expected, atol=1e-4, rtol=1e-4)


def test_open_clips_layout_gives_open_clips_embedding() -> None:
    open_clip = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
    torch.manual_seed(3)
    visual = open_clip.VisionTransformer(224, 56, 64, 2, 1, 2.0, output_dim=24).eval().requires_grad_(False)
    for name, parameter in visual.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    beside = {f"visual.{name}": value for name, value in visual.state_dict().items()} | {"logit_scale": torch.ones(())}
    tower = image_tower_from_state_dict(beside)
    pixels = torch.rand(2, 3, 224, 224)
    from lib_portrait.faces.features import CLIP_MEAN, CLIP_STD

    expected = visual(normalised(pixels, CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(tower.embedding(pixels), expected, atol=1e-5, rtol=1e-5)


def test_towers_without_a_projection_and_damaged_ones_are_refused() -> None:
    tensors = dict(clip().state_dict())
    projection = tensors.pop("visual_projection.weight")
    with pytest.raises(PortraitError, match="no projection of pictures"):
        image_tower_from_state_dict(tensors, field="ViT-L.bin")
    with pytest.raises(PortraitError, match="infinities or NaN"):
        image_tower_from_state_dict({**tensors, "visual_projection.weight": projection * torch.nan})
    with pytest.raises(PortraitError, match="has the shape"):
        image_tower_from_state_dict({**tensors, "visual_projection.weight": projection[:, :60]})


def test_the_encoder_gives_one_embedding_a_face_and_says_what_is_not_finite() -> None:
    made = []

    def network() -> Any:
        made.append(1)
        return image_tower_from_state_dict(clip().state_dict())

    encoder = PictureEncoder(network, "hash")
    crops = list(np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8))
    assert encoder.encode([]) == [] and not made
    one, two = encoder.encode(crops)
    assert one.image.shape == (24,) and not one.intrinsic.numel() and not torch.equal(one.image, two.image)
    alone = encoder.encode(crops[1:])[0].image
    torch.testing.assert_close(alone, two.image, atol=1e-5, rtol=1e-5)
    assert made == [1] and not encoder.zero().image.any() and encoder.key == "image-hash-float32"
    bad = clip()
    bad.visual_projection.weight.fill_(3e38)
    broken = PictureEncoder(lambda: image_tower_from_state_dict(bad.state_dict()), "hash")
    with pytest.raises(PortraitError, match="infinite or undefined features"):
        broken.encode(crops)


def test_the_embedding_reads_the_picture_as_it_is_at_other_sizes() -> None:
    tower = image_tower_from_state_dict(clip().state_dict())
    pixels = F.interpolate(torch.rand(1, 3, 7, 7), size=(448, 448), mode="bicubic").clamp(0, 1)
    small = F.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True)
    torch.testing.assert_close(tower.embedding(pixels), tower.embedding(small), atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------- a request, without the WebUI


def aligned(seed: int) -> Photo:
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC).save(stream, "PNG")
    return Photo.of(stream.getvalue(), aligned=True)


def test_a_request_draws_people_where_their_words_are(tmp_path: Path) -> None:
    """From photos and files to the context that the UNet is called with: each picture of a batch by its own prompt."""
    tower, model = clip(), small_model()
    save_file({name: value.contiguous() for name, value in tower.state_dict().items()}, tmp_path / "eye.safetensors")
    layer = adapter(24)
    save_file(layer.state_dict(), tmp_path / "omniportrait_small.safetensors", {"vision": "eye.safetensors"})
    service = FaceService([], tmp_path / "cache")
    conditioner = Conditioner(service, Store(Folders(own=[tmp_path]), adapter_files(), tmp_path / "cache"))
    own = {"strength": 1.0, "word": ""}
    photos = [(aligned(1), aligned(2)), (aligned(3),)]
    request = PortraitRequest(
        tuple(Identity(one, options=own) for one in photos), method="omniportrait", checkpoint="small"
    )
    made = conditioner.prepare(request, (64, 64))
    encoder = PictureEncoder(lambda: image_tower_from_state_dict(tower.state_dict()), "hash")
    for person, theirs in zip(made.people, photos):
        features = encoder.encode([service.crop(photo, "photo") for photo in theirs])
        expected = torch.stack([one.image for one in features]).mean(dim=0)
        torch.testing.assert_close(person.e_ref, expected, atol=1e-5, rtol=1e-5)  # type: ignore[attr-defined]
    prompts, seen = ["a man and a woman", "girl , a boy"], []
    handle = model.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )
    asked = [Sampling(prompt, width=64, height=64, steps=1) for prompt in prompts]
    sample(model, asked, made)
    bare = encode_prompts(model, ["", "", *prompts])
    # Behind the token that begins a prompt.
    expected = bare.clone()
    for row, person, place in ((2, 0, 2), (2, 1, 5), (3, 0, 1), (3, 1, 4)):
        expected[row, place] = layer(made.people[person].e_ref, bare[row, place])  # type: ignore[attr-defined]
    torch.testing.assert_close(seen[-1], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(PortraitError, match="no word for identity 2 of 2"):
        sample(model, [*asked, Sampling("two women", width=64, height=64, steps=1)], made)
    handle.remove()
    save_file(adapter(25).state_dict(), tmp_path / "omniportrait_other.safetensors", {"vision": "eye.safetensors"})
    with pytest.raises(PortraitError, match="wants image features of width 25, eye.safetensors gives 24"):
        conditioner.prepare(replace(request, checkpoint="other"), (64, 64))
    (tmp_path / "eye.safetensors").unlink()
    with pytest.raises(PortraitError, match="missing: eye.safetensors"):
        conditioner.prepare(request, (64, 64))
