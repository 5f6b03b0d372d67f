"""InstantFamily in the WebUI: in the UNet, and in the network of the ControlNet unit that its kit names."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.kit import Manifest, StoredFile, write_manifest
from lib_portrait.control_picture import skeletons
from lib_portrait.methods.instantfamily import COLOURS, EXCLUDE, MULTIPLY, FaceProjections, Properties
from lib_portrait.request import Photo
from tests.unit.test_layout import head
from tests.webui.oracle import Oracle, assert_nobody_is_seen, recorded_sites
from tests.webui.server import Client, Recording, left_behind
from tests.webui.test_controlnet import REFERENCE, beside, control  # noqa: F401
from tests.webui.test_matrix import LONG, difference, one, pixels_of
from tests.webui.world import BACKBONE_WIDTHS, BLOCKS, LDM_PATHS, World
from trainer.shards import encode_png

pytestmark = pytest.mark.webui

CONTEXT = 64
BOXES = ((0.05, 0.1, 0.4, 0.5), (0.55, 0.2, 0.95, 0.7), (0.3, 0.4, 0.6, 0.9))
CONTROL_PATHS = (*LDM_PATHS[:6], "middle_block.1")
FAMILY = "family"


def stored(path: Path) -> StoredFile:
    return StoredFile(path.name, file_sha256(path), path.stat().st_size)


@pytest.fixture(scope="module", autouse=True)
def adapters(world: World) -> Iterator[None]:
    """Kits whose tensors are the same: one that names the control network, one with circles of other colours, one that
    names none, one whose network is nowhere, and one that names another family's; and other control networks."""
    torch.manual_seed(0)
    properties = Properties(inner=tuple(width for _, width in BLOCKS))
    projections = FaceProjections(64, BACKBONE_WIDTHS[-1], CONTEXT, properties)
    for parameter in projections.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    network = world.models / "ControlNet" / "control.safetensors"
    other, wide = (network.with_name(f"{name}.safetensors") for name in ("depth", "wide"))
    changed = load_file(network)
    changed["middle_block_out.0.bias"] += 1
    save_file(changed, other)
    # As it would be for SD2, whose contexts are wider.
    for name in changed:
        if ".attn2.to_k." in name or ".attn2.to_v." in name:
            changed[name] = changed[name].repeat(1, 2)
    save_file(changed, wide)
    kits = {
        FAMILY: (properties, stored(network)),
        "blue": (dataclasses.replace(properties, colours=("0000ff",)), stored(network)),
        "alone": (properties, None),
        "lost": (properties, StoredFile("gone.safetensors", "0" * 64, 1000)),
        "strange": (properties, stored(wide)),
    }
    files = [other, wide]
    for name, (own, named) in kits.items():
        files += [world.kit / f"instantfamily_{name}.safetensors", world.kit / f"{name}.kit.json"]
        save_file({**projections.state_dict()}, files[-2], own.to_metadata())
        backbone = {"backbone": stored(world.kit / "tiny_backbone.safetensors")}
        adapter = {"instantfamily": files[-2].name}
        write_manifest(files[-1], Manifest(name, "instantfamily", adapter, backbone, control=named))
    yield
    for file in files:
        file.unlink()


def family(people: dict[str, str], *names: str, kit: str = FAMILY, **more: Any) -> dict[str, Any]:
    identities = [{"photos": [people[name]], "region": {"box": list(box)}} for name, box in zip(names, BOXES)]
    return {"method": "instantfamily", "checkpoint": kit, "identities": identities, **more}


class Equations:
    """What the cross-attentions of the UNet and of the control network should put out (eq. 4 to 8)."""

    tolerance = 1e-3

    def __init__(self, world: World, oracle: Oracle, people: dict[str, str]):
        self.oracle, self.world = oracle, world
        self.control = load_file(world.models / "ControlNet" / "control.safetensors")
        file = world.kit / f"instantfamily_{FAMILY}.safetensors"
        projections = FaceProjections.from_tensors(load_file(file), Properties(inner=(1,)))
        self.tokens = {}
        for name, photo in people.items():
            crop = oracle._faces.crop(Photo.of(base64.b64decode(photo)), "photo")
            found = oracle._encoder.encode([crop])[0]
            with torch.no_grad():
                embedding = found.embedding / found.embedding.norm()
                self.tokens[name] = projections(embedding, found.intrinsic)

    def output(
        self, weights: dict[str, Tensor], bias: Tensor, x: Tensor, context: Tensor, names: Sequence[str], mask: str
    ) -> Tensor:
        """Of one row: x (n, C), context (m, D)."""
        side = round(len(x) ** 0.5)
        edges = torch.arange(side + 1) / side
        stack, m = [context], [torch.ones(len(x), len(context))]
        for name, (left, top, right, bottom) in zip(names, BOXES):
            across, down = (right - left) / 8, (bottom - top) / 8
            shares = [
                (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * side
                for low, high in ((top - down, bottom + down), (left - across, right + across))
            ]
            share = shares[0][:, None] * shares[1]
            inside = (share >= min(0.5, share.max().item()) - 1e-6) & (share > 0)
            stack.append(self.tokens[name])
            m.append(inside.flatten()[:, None].float().expand(-1, len(self.tokens[name])))
        stacked, mask_all = torch.cat(stack), torch.cat(m, dim=1)
        q, k, v = (
            (inputs @ weights[part].T).unflatten(-1, (self.world.heads, -1)).transpose(0, 1)
            for part, inputs in (("to_q", x), ("to_k", stacked), ("to_v", stacked))
        )
        logits = q @ k.transpose(1, 2)
        logits = mask_all * logits if mask == MULTIPLY else logits.masked_fill(mask_all == 0, -torch.inf)
        attended = (logits / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
        return attended.transpose(0, 1).flatten(1) @ weights["to_out"].T + bias

    def check(self, recording: Recording, names: Sequence[str], mask: str = MULTIPLY, in_control: bool = True) -> None:
        """Positive rows of both networks see these people, the others the text alone."""
        assert recording.answer.status == 200, recording.answer.detail
        for number, call in enumerate(recording.calls):
            checkpoint = call["checkpoint"]
            for site in recorded_sites(recording, number):
                weights = {part: self.oracle._weight(site, part, checkpoint, {}) for part in ("to_q", "to_k", "to_v")}
                weights["to_out"] = self.oracle._weight(site, "to_out", checkpoint, {})
                bias = self.oracle._bias(site, checkpoint)
                seen = {part: recording.tensors[f"{number}.{site}.0.{part}"] for part in ("in", "context", "out")}
                seen["in"] = self.oracle.queried(site, seen["in"])
                self._check_rows(weights, bias, seen, call["kinds"], names, mask)
        self.check_control(recording, names if in_control else (), mask)

    def check_control(self, recording: Recording, names: Sequence[str], mask: str = MULTIPLY) -> None:
        """Positive rows of the control network see these people, the others the text alone."""
        rows = [call["kinds"] for call in recording.calls for _ in CONTROL_PATHS]
        crossing = [i for i, seen in enumerate(recording.foreign) if seen["tokens"]]
        assert len(crossing) == len(rows), "the control network was not run at every step"
        for i, kinds, path in zip(crossing, rows, CONTROL_PATHS * len(recording.calls)):
            attention = f"{path}.transformer_blocks.0.attn2"
            weights = {part: self.control[f"{attention}.{part}.weight"] for part in ("to_q", "to_k", "to_v")}
            weights["to_out"] = self.control[f"{attention}.to_out.0.weight"]
            seen = {part: recording.tensors[f"foreign.{i}.{part}"] for part in ("in", "context", "out")}
            bias = self.control[f"{attention}.to_out.0.bias"]
            self._check_rows(weights, bias, seen, kinds, names, mask)

    def _check_rows(
        self,
        weights: dict[str, Tensor],
        bias: Tensor,
        seen: dict[str, Tensor],
        kinds: Sequence[str],
        names: Sequence[str],
        mask: str,
    ) -> None:
        assert set(kinds) <= {"positive", "negative"}
        for row, kind in enumerate(kinds):
            people = names if kind == "positive" else ()
            wanted = self.output(weights, bias, seen["in"][row], seen["context"][row], people, mask)
            assert (seen["out"][row] - wanted).norm() < self.tolerance * wanted.norm(), (row, kind)


@pytest.fixture(scope="module")
def equations(adapters: None, world: World, oracle: Oracle, people: dict[str, str]) -> Equations:
    return Equations(world, oracle, people)


def recorded(client: Client, portrait: dict[str, Any] | None, *units: dict[str, Any], **more: Any) -> Recording:
    return client.record(portrait, {"foreigners": True}, **beside(*units), **more)


CELLS = {
    "plain": {},
    "long": {"prompt": LONG},
    "AND": {"prompt": "a person AND a hat"},
    "batch": {"batch_size": 2, "steps": 2},
    "apart": {"override_settings": {"batch_cond_uncond": False, "pad_cond_uncond": False}},
}


@pytest.mark.parametrize("cell", CELLS)
def test_both_networks_do_what_the_equations_say(
    server_with_controlnet: Client,
    equations: Equations,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
    cell: str,
) -> None:
    names, mask = (("ada", "ben", "cleo"), MULTIPLY) if cell != "long" else (("ben",), EXCLUDE)
    portrait = family(people, *names, mask=mask)
    equations.check(recorded(server_with_controlnet, portrait, control, **CELLS[cell]), names, mask)


def test_the_control_network_of_other_methods_sees_the_text_alone(
    server_with_controlnet: Client,
    oracle: Oracle,
    equations: Equations,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
) -> None:
    recording = recorded(server_with_controlnet, one(people), control)
    assert recording.answer.status == 200
    equations.check_control(recording, ())
    equations.check(recorded(server_with_controlnet, None, control), ())
    assert_nobody_is_seen(server_with_controlnet.record(**beside(control)), oracle)


def test_circles_have_the_colours_of_the_kit(
    server_with_controlnet: Client,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
) -> None:
    client = server_with_controlnet
    white, blue = (
        client.record(family(people, "ada", kit=kit), **beside(control)).latents() for kit in (FAMILY, "blue")
    )
    assert difference(white, blue) > 1e-3
    plain = [client.record(family(people, "ada", kit=kit)).latents() for kit in (FAMILY, "blue")]
    assert torch.equal(*plain)


def test_the_control_picture_is_shown_on_request(
    server_with_controlnet: Client,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
) -> None:
    client = server_with_controlnet
    plain = client.generate(family(people, "ada", "ben"), **beside(control)).images
    shown = client.generate(family(people, "ada", "ben", show_control=True), n_iter=2, **beside(control)).images
    # The extension shows what its unit was given, and behind it, once, what the network saw.
    assert len(plain) == 2 and len(shown) == 4, (len(plain), len(shown))
    given, seen = (pixels_of(one).astype(int) for one in shown[-2:])
    changed = np.abs(given - seen).max(axis=2) > 2
    for (left, top, right, bottom), colour in zip(BOXES[:2], COLOURS):
        x, y = round(64 * (left + right)), round(64 * (top + bottom))
        assert seen[y, x].tolist() == list(bytes.fromhex(colour))
    assert 0.005 < changed.mean() < 0.05


CASES = {"another network": FAMILY, "no unit": FAMILY, "no name in the kit": "alone", "no file of the kit's": "lost"}


@pytest.mark.parametrize("case", CASES)
def test_without_its_network_the_unet_alone_carries_people_and_a_notice_says_so(
    server_with_controlnet: Client,
    equations: Equations,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
    case: str,
) -> None:
    client = server_with_controlnet
    models = client.call("/controlnet/model_list").body["model_list"]
    depth = next(name for name in models if name.startswith("depth"))
    unit = {**control, "model": depth} if case == "another network" else control
    portrait = family(people, "ada", "ben", kit=CASES[case])
    if case == "no unit":
        recording = client.record(portrait)
        assert not recording.foreign
    else:
        recording = recorded(client, portrait, unit)
        equations.check(recording, ("ada", "ben"), in_control=False)
    told = recording.answer.info["infotexts"][0]
    assert "carried by the UNet's attention alone" in told
    assert case != "no file of the kit's" or "no enabled unit runs gone.safetensors" in told
    ours = client.record(family(people, "ada", "ben"), **beside(control)).answer
    assert "attention alone" not in ours.info["infotexts"][0]


def test_a_control_network_of_another_family_is_refused(
    server_with_controlnet: Client,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
) -> None:
    client = server_with_controlnet
    models = client.call("/controlnet/model_list").body["model_list"]
    wide = next(name for name in models if name.startswith("wide"))
    refused = client.record(family(people, "ada", kit="strange"), **beside({**control, "model": wide}))
    assert refused.answer.status == 422 and not refused.calls
    assert "this ControlNet was made for another kind of model" in refused.answer.detail
    assert client.generate(family(people, "ada"), **beside(control)).status == 200


def test_faces_that_touch_are_taken_and_faces_that_overlap_are_told(
    server_with_controlnet: Client, people: dict[str, str]
) -> None:
    client = server_with_controlnet

    def said(*boxes: tuple[float, float, float, float]) -> str:
        portrait = family(people, "ada", "ben")
        for identity, box in zip(portrait["identities"], boxes):
            identity["region"] = {"box": list(box)}
        answer = client.generate(portrait, steps=1)
        assert answer.status == 200, answer.detail
        return answer.info["infotexts"][0]

    assert "overlaps" not in said((0.1, 0.2, 0.5, 0.7), (0.5, 0.2, 0.9, 0.7))
    told = "it overlaps that of identities[0] on 10% of the picture, where the faces of both are seen"
    assert told in said((0.1, 0.2, 0.6, 0.7), (0.4, 0.2, 0.9, 0.7))


@pytest.mark.parametrize("first", ["portrait", "sd-webui-controlnet"])
def test_the_order_of_activation_does_not_matter(
    server_with_controlnet: Client,
    equations: Equations,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
    first: str,
) -> None:
    client = server_with_controlnet
    assert client.call("/probe/first", {"extension": first}).status == 200
    try:
        equations.check(recorded(client, family(people, "ada", "ben"), control), ("ada", "ben"))
        assert client.record(family(people, "ada", "ben"), **beside(control, REFERENCE)).answer.status == 200
    finally:
        assert client.call("/probe/first", {"extension": None}).status == 200


def test_nothing_is_left_in_either_network(
    server_with_controlnet: Client,
    equations: Equations,
    people: dict[str, str],
    control: dict[str, Any],  # noqa: F811
) -> None:
    client, portrait = server_with_controlnet, family(people, "ada", "ben")
    assert client.generate(portrait, **beside(control)).status == 200
    vanilla, controlled = client.generate().images, client.generate(**beside(control)).images
    assert client.generate().images == vanilla
    before = client.state()
    assert client.generate(portrait, **beside(control)).status == 200
    assert client.record(portrait, {"fail": {"call": 1, "site": 13}}, **beside(control)).answer.status == 500
    assert client.record(portrait, {"interrupt": {"call": 0}}, **beside(control)).answer.status == 200
    assert client.generate(portrait, enable_hr=True, denoising_strength=0.7, **beside(control)).status == 200
    assert client.generate(**beside(control)).images == controlled
    equations.check(recorded(client, None, control), ())
    assert client.generate().images == vanilla
    assert left_behind(client, before) == {}


def test_what_cannot_be_honoured_is_refused(server_with_controlnet: Client, people: dict[str, str]) -> None:
    client, portrait = server_with_controlnet, family(people, "ada", "ben")
    del portrait["identities"][1]["region"]
    answer = client.generate(portrait)
    assert answer.status == 422 and answer.detail.startswith("identities[1].region"), answer.detail
    assert client.generate({**portrait, "mask": "none"}).status == 200
    for wrong, field in (({"mask": "soft"}, "mask"), ({"scale": 1.0}, "scale"), ({"checkpoint": "tiny"}, "checkpoint")):
        answer = client.generate(family(people, "ada", **wrong))
        assert answer.status == 422 and answer.detail.startswith(field), answer.detail
    outside = family(people, "ada")
    outside["identities"][0]["region"] = {"box": [0.5, 0.5, 1.5, 0.9]}
    answer = client.generate(outside)
    assert answer.status == 422 and answer.detail.startswith("identities[0].region"), answer.detail


def test_a_layout_is_the_boxes_of_its_heads(server_with_controlnet: Client, people: dict[str, str]) -> None:
    client = server_with_controlnet
    pose = skeletons([head(90, 60, 30), head(35, 50, 40)], (128, 128))
    picture = base64.b64encode(encode_png(pose)).decode()
    named = family(people, "ada", "ben")
    laid_out: dict[str, Any] = {**named, "layout": picture}
    laid_out["identities"] = [{"photos": one["photos"]} for one in named["identities"]]
    first = client.record(laid_out, sites=())
    infotext = first.answer.info["infotexts"][0]
    boxes = [[float(edge) for edge in box.split()] for box in re.findall(r"box ([0-9. ]+)", infotext)]
    assert len(boxes) == 2 and [round((box[0] + box[2]) * 64) for box in boxes] == [35, 90], infotext
    for identity, box in zip(named["identities"], boxes):
        identity["region"] = {"box": box}
    assert torch.equal(first.latents(), client.record(named, sites=()).latents())
    assert torch.equal(first.latents(), client.record(sites=(), infotext=infotext).latents())
    laid_out["identities"].append({"photos": [people["cleo"]]})
    answer = client.generate(laid_out)
    assert answer.status == 422 and answer.detail.startswith("layout"), answer.detail
    assert "2 faces" in answer.detail and "3 people" in answer.detail


def test_the_infotext_brings_the_picture_back(server_with_controlnet: Client, people: dict[str, str]) -> None:
    client = server_with_controlnet
    first = client.record(family(people, "ada", "ben", mask=EXCLUDE), sites=())
    infotext = first.answer.info["infotexts"][0]
    assert f"Portrait: instantfamily; adapter {FAMILY}; mask exclude" in infotext
    assert torch.equal(first.latents(), client.record(sites=(), infotext=infotext).latents())
