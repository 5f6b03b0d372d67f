"""The panel's positional values: to a request and back, with no gradio and no host."""

from __future__ import annotations

import base64
import io
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lib_portrait.checkpoints import Folders, Store
from lib_portrait.errors import NoSuchFace, PortraitError
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.methods.declarations.uniportrait import FILES
from lib_portrait.request import Identity, Limits, Mix, Photo, PortraitRequest, Region, parse_request
from lib_portrait.webui import inputs, panel_values
from lib_portrait.webui.inputs import box_from_text, box_to_text
from lib_portrait.webui.panel_values import (
    divided,
    read_form,
    request_from_values,
    said_in_panel,
    said_of_tab,
    tabs_in_use,
    values_from_request,
)

PNG = b"\x89PNG not decoded here"
HASH = "sha256:" + 64 * "a"


def panel(identities: int = 1, **given):
    """The panel's values with its defaults (None), and some controls set: `enabled` or `face`, `photos_2` for tab 2."""
    values = [None] * (len(panel_values.GLOBAL_FIELDS) + identities * len(panel_values.IDENTITY_FIELDS))
    values[0] = True
    for name, value in given.items():
        field, _, number = name.rpartition("_") if name[-1].isdigit() else (name, "", "1")
        if name in panel_values.GLOBAL_FIELDS:
            values[panel_values.GLOBAL_FIELDS.index(field)] = value
        else:
            block = len(panel_values.GLOBAL_FIELDS) + (int(number) - 1) * len(panel_values.IDENTITY_FIELDS)
            values[block + panel_values.IDENTITY_FIELDS.index(field)] = value
    return values


def sent(values, beyond=panel_values.NOTHING_BEYOND):
    """All that the page sends, with untouched controls of further methods behind these values."""
    people = (len(values) - len(panel_values.GLOBAL_FIELDS)) // len(panel_values.IDENTITY_FIELDS)
    return [*values, beyond, *(None for _ in panel_values.further_controls(people))]


@dataclass
class Upload:
    """What gradio 3 gives for an uploaded file."""

    name: str
    orig_name: str = "photo.png"


@pytest.fixture
def gradio_folder(tmp_path, monkeypatch):
    folder = tmp_path / "gradio"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    return folder


def upload(folder: Path, data: bytes = PNG, name: str = "photo.png") -> Upload:
    path = folder / name
    path.write_bytes(data)
    return Upload(str(path), name)


def png(colour, size=(8, 8), mode="RGB"):
    return Image.new(mode, size, colour)


# ------------------------------------------------------------------------------------------------- values to request


def test_an_object_in_the_first_place_is_the_request():
    request = {"identities": [{"photos": [HASH]}]}
    assert request_from_values([request, *panel()[1:]]) is request


def test_faults_are_told_by_the_panels_tabs():
    values = panel(4, photos_2=HASH, photos_3="[ null ]", mix1_photos_4=json.dumps([HASH]))
    assert tabs_in_use(values) == [2, 4] and len(request_from_values(values)["identities"]) == 2
    assert said_of_tab("identities[0].photos[1]", [2, 4]) == "Identity 2, photo 2"
    assert said_of_tab("identities[1].mix[0].photos[2]", [2, 4]) == "Identity 4, mixed-in person 1, photo 3"
    assert said_of_tab("identities[0].photos[1].image", [2, 4]) == "Identity 2, photo 2"
    assert said_of_tab("identities[1].region.mask", [2, 4]) == "Identity 4, region, mask"
    assert said_of_tab("identities[1].structure", [2, 4]) == "Identity 4, face structure (β)"
    assert [said_of_tab(name, [2, 4]) for name in ("checkpoint", "scale", "identities", "mine.safetensors")] == [
        "Checkpoint",
        "ID scale",
        "Identities",
        "mine.safetensors",
    ]
    # A request that is an object has keys of its own.
    assert tabs_in_use([{"identities": []}, *values[1:]]) == tabs_in_use([]) == []
    assert said_of_tab("identities[0].photos[1]", []) == "identities[0].photos[1]"


def test_the_whole_panel_is_read_as_tabs_and_form():
    values = panel(4, photos_2=HASH, photos_4=HASH)
    tabs, form = read_form(sent(values), Limits())
    assert (tabs, form) == ([2, 4], request_from_values(values))
    request = {"identities": [{"photos": [HASH]}]}
    assert read_form(sent([request, *values[1:]]), Limits()) == ([], request)


@pytest.mark.parametrize("first", [False, None, {"enabled": False, "identities": "not read"}])
def test_of_a_panel_that_is_switched_off_nothing_is_read(first):
    values = panel(2, photos_2=HASH, region_2="circle")
    assert read_form(sent([first, *values[1:]]), Limits()) == ((), None)


def test_what_cannot_be_read_from_the_controls_is_said_by_their_names():
    values = panel(3, photos_3=HASH, region_3=inputs.MASK)
    with pytest.raises(PortraitError, match=r"^Identity 3, region, mask: nothing is painted"):
        read_form(sent(values), Limits())


def test_values_beyond_the_panel_are_refused_by_their_place():
    with pytest.raises(PortraitError, match=r"^args\[\d+\]: the list is longer than the panel, which has 2 people"):
        read_form(sent(panel(2, photos=HASH), HASH), Limits())


def test_an_upload_beyond_the_limits_is_read_with_these_limits(gradio_folder):
    values = panel(uploads=[upload(gradio_folder, b"x" * 2000)])
    with pytest.raises(PortraitError, match=r"^Identity 1, photo 1: .*Settings"):
        read_form(sent(values), Limits(photo_bytes=1000, page="Settings > Portrait"))


@pytest.mark.parametrize("values", [[], [False], [None], panel(enabled=False), panel(enabled=None)])
def test_disabled_is_none(values):
    assert request_from_values(values) is None


def test_what_is_no_switch_is_left_for_checking_to_refuse():
    with pytest.raises(PortraitError) as caught:
        parse_request(request_from_values(panel(enabled="yes", photos=HASH)))
    assert caught.value.field == "enabled"


def test_enabled_without_any_photo_says_what_to_do_in_the_panel():
    with pytest.raises(PortraitError) as caught:
        request_from_values(panel(4))
    assert caught.value.detail == "Identities: there is no person. Add a photo to Identity 1, or untick Enable."


# Words of the API's keys, of its counting from 0 and of its file names, which nobody has seen who uses the panel.
FOREIGN = re.compile(
    r"identities|\[\d|\]|\.photos|weight\b|\bindex\b|JSON|/portrait/|base64|null|lora_scale|structure:"
)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scale": 5.0}, "ID scale: 5.0 is out of range. Give a number from 0 to 2."),
        ({"lora_scale": -1}, "LoRA scale: -1 is out of range. Give a number from 0 to 2."),
        (
            {"checkpoint": "../x"},
            "Checkpoint: '../x' is not a bare file name. Give the name of an adapter, without a fol",
        ),
        ({"structure_2": 3}, "Identity 2, face structure (β): 3 is out of range. Give a number from 0 to 2."),
        ({"start_2": 0.9, "end_2": 0.2}, "Identity 2, start: 0.9 is not before end 0.2. Give a start below the end."),
        ({"photos_2": json.dumps([HASH] * 9)}, "Identity 2, photos: 9 photos, at most 8 are allowed. Remove some of"),
        ({"region_2": "box", "box_2": "0, 0, 50"}, "Identity 2, region, box: 3 numbers are given instead of 4. Give"),
        ({"region_2": "mask"}, "Identity 2, region, mask: nothing is painted. Paint where this person goes, or use"),
        (
            {
                "mix1_photos_2": f'["{HASH}"]',
                "mix1_weight_2": 0.8,
                "mix2_photos_2": f'["{HASH}"]',
                "mix2_weight_2": 0.7,
            },
            "Identity 2, mixed-in people: the shares add up to 1.5. Keep the sum of their shares at 1 or below.",
        ),
        ({"photos_2": "", "mix1_photos_2": f'["{HASH}"]'}, "Identity 2, photos: there is no photo. Add at least one"),
        ({"photos_2": "[ broken"}, "Identity 2, photos: the list of photos cannot be read. Remove"),
    ],
)
def test_what_the_panel_refuses_is_said_in_its_words(given, said):
    values = panel(3, **{"photos_2": f'["{HASH}"]', **given})
    with pytest.raises(PortraitError) as caught:
        parse_request(request_from_values(values))
    error = said_in_panel(caught.value, tabs_in_use(values))
    assert error.detail.startswith(said) and error.status_code == 422
    assert not FOREIGN.search(error.detail)


@pytest.mark.parametrize(
    ("found", "problem"),
    [(1, "the 2nd face from the left was chosen, but there is one face"), (0, "but there are 0 faces")],
)
def test_a_face_that_is_not_there_is_counted_from_one(found, problem):
    error = said_in_panel(NoSuchFace("identities[0].photos[2].face", 1, found), [3])
    assert error.field == "Identity 3, photo 3" and problem in error.problem and not FOREIGN.search(error.detail)
    assert "face 1 was asked for" in said_in_panel(NoSuchFace("identities[0].photos[2].face", 1, 1), []).problem


def test_missing_weights_name_the_button_instead_of_folders(tmp_path):
    store = Store(Folders([tmp_path / "own"], {"vision": [tmp_path / "shared"]}), adapter_files())
    with pytest.raises(PortraitError) as caught:
        store.kit()
    error = said_in_panel(caught.value, [1])
    assert error.remedy.startswith("Press Download missing weights") and error.status_code == 404
    assert error.field == "Checkpoint" and "uniportrait-faceid_sd15.bin" in error.problem
    assert str(tmp_path) not in error.detail and "https://" not in error.detail and len(error.detail) < 400
    # The API and the command line have no button.
    assert said_in_panel(caught.value, []) is caught.value and str(tmp_path) in caught.value.detail


def test_a_missing_router_says_whom_it_is_for(tmp_path):
    for weight in FILES.published:
        (tmp_path / weight.filename.replace("_sd15", "_mine")).touch()
        (tmp_path / weight.filename).touch()
    for name, button in (("sd15", True), ("mine", False)):
        (tmp_path / f"uniportrait-router_{name}.bin").unlink()
        with pytest.raises(PortraitError) as caught:
            Store(Folders([tmp_path]), adapter_files()).kit(name).check_people(2)
        error = said_in_panel(caught.value, [1, 2])
        assert "several people need its router" in error.problem and error.field == "Identities"
        assert ("Download missing weights" in error.remedy) is button
        assert button or f"uniportrait-router_{name}.bin" in error.remedy


def test_untouched_controls_give_the_defaults():
    assert parse_request(request_from_values(panel(photos=HASH))) == PortraitRequest(
        identities=(Identity(photos=(Photo(64 * "a"),)),)
    )


def test_all_controls_arrive():
    request = request_from_values(
        panel(
            2,
            method="UniPortrait",
            checkpoint="mine (files missing)",
            scale=0.5,
            lora_scale=0.25,
            show_routing=True,
            photos_2=json.dumps([HASH, {"image": HASH, "face": 3}]),
            face_2="2nd from left",
            aligned_2=True,
            scale_2=1.5,
            structure_2=0.3,
            start_2=0.1,
            end_2=0.9,
            region_2="box",
            box_2="0, 10, 50, 100",
            mix2_photos_2=json.dumps([HASH]),
            mix2_weight_2=0.25,
        )
    )
    assert request == {
        "enabled": True,
        "method": "uniportrait",
        "checkpoint": "mine",
        "scale": 0.5,
        "lora_scale": 0.25,
        "show_routing": True,
        "identities": [
            {
                "photos": [{"image": HASH, "face": 1, "aligned": True}, {"image": HASH, "face": 3}],
                "scale": 1.5,
                "structure": 0.3,
                "start": 0.1,
                "end": 0.9,
                "region": {"box": [0.0, 0.1, 0.5, 1.0]},
                "mix": [{"photos": [HASH], "weight": 0.25}],
            }
        ],
    }


def test_people_mixed_into_nobody_are_not_dropped_in_silence():
    with pytest.raises(PortraitError) as caught:
        parse_request(request_from_values(panel(mix1_photos=HASH)))
    assert caught.value.field == "identities[0].photos"


@pytest.mark.parametrize(
    "photos",
    [
        "QUJD",
        ["QUJD"],
        {"image": "QUJD"},
        '["QUJD"]',
        "data:image/png;base64,QUJD",
    ],
)
def test_photos_of_api_users_in_every_form(photos):
    for control in ("photos",) if photos == '["QUJD"]' else ("photos", "uploads"):
        request = parse_request(request_from_values(panel(**{control: photos})))
        assert request.identities[0].photos[0].data == b"ABC"


@pytest.mark.parametrize(
    "photos", [3, [3], [None, True], {"name": "/etc/passwd", "is_file": True}, "[", "[[", '{"a":', "nö"]
)
def test_what_is_no_photo_is_refused(photos):
    with pytest.raises(PortraitError):
        request = request_from_values(panel(photos=photos))
        parse_request(request)


@pytest.mark.parametrize("control", ["photos", "uploads", "mask", "mix1_uploads"])
def test_a_path_given_as_text_is_never_opened(control, tmp_path, monkeypatch):
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read"))
    given = {"photos": HASH, "region": "mask" if control == "mask" else "automatic", control: str(secret)}
    with pytest.raises(PortraitError, match="not valid base64"):
        parse_request(request_from_values(panel(**given)))


# ------------------------------------------------------------------------------------------------------------ uploads


def test_an_upload_is_read(gradio_folder):
    request = request_from_values(panel(uploads=[upload(gradio_folder)]))
    assert request["identities"][0]["photos"] == [base64.b64encode(PNG).decode()]


def test_an_upload_that_is_stored_already_counts_once(gradio_folder):
    stored = "sha256:" + Photo.of(PNG).sha256
    request = request_from_values(panel(uploads=[upload(gradio_folder)], photos=json.dumps([stored])))
    assert request["identities"][0]["photos"] == [stored]


def test_a_large_upload_is_refused_by_name(gradio_folder):
    with pytest.raises(PortraitError, match="Settings") as caught:
        request_from_values(
            panel(uploads=[upload(gradio_folder, b"x" * 2000)]), Limits(photo_bytes=1000, page="Settings > Portrait")
        )
    assert caught.value.field == "identities[0].photos[0]"


def test_only_files_that_gradio_took_are_opened(gradio_folder, tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(PNG)
    link = gradio_folder / "link.png"
    link.symlink_to(outside)
    inside = upload(gradio_folder)
    for fake in (
        Upload(str(outside)),
        Upload(str(gradio_folder / ".." / "outside.png")),
        Upload(str(link)),
        # gradio 3 copies what a client names into its folder, and keeps the name it was given.
        Upload(inside.name, str(outside)),
        Upload(inside.name, "../outside.png"),
    ):
        with pytest.raises(PortraitError, match="not uploaded here"):
            request_from_values(panel(uploads=[fake]))


def test_an_upload_that_is_gone_says_so(gradio_folder):
    with pytest.raises(PortraitError, match="gone"):
        request_from_values(panel(uploads=[Upload(str(gradio_folder / "none.png"))]))


def test_gradios_folder_without_its_variable(monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    folder = Path(tempfile.gettempdir()) / "gradio"
    with pytest.raises(PortraitError, match="gone"):
        request_from_values(panel(uploads=[Upload(str(folder / "no such file"))]))


# -------------------------------------------------------------------------------------------------------------- faces


@pytest.mark.parametrize(
    ("index", "name"),
    [(None, "Largest"), (0, "1st from left"), (1, "2nd from left"), (2, "3rd from left"), (10, "11th from left")],
)
def test_names_of_faces(index, name):
    assert inputs.face_name(index) == name
    request = parse_request(request_from_values(panel(photos=HASH, face=name)))
    assert request.identities[0].photos[0].face == index


@pytest.mark.parametrize("face", ["first", "0th from left", -1, 2.5, "1st from left or so"])
def test_an_unknown_face_is_refused(face):
    with pytest.raises(PortraitError) as caught:
        parse_request(request_from_values(panel(photos=HASH, face=face)))
    assert caught.value.field == "identities[0].photos[0].face"


# ------------------------------------------------------------------------------------------------------------ regions


@pytest.mark.parametrize(
    ("text", "box"),
    [("0, 0, 50, 100", [0, 0, 0.5, 1]), ("10% 20% 30% 40%", [0.1, 0.2, 0.3, 0.4]), ("0;0;7;7.5", [0, 0, 0.07, 0.075])],
)
def test_boxes_in_percent(text, box):
    assert box_from_text(text, "box") == box


@pytest.mark.parametrize(
    "text",
    ["", None, "1, 2, 3", "1 2 3 4 5", "a b c d", "0 0 0 50", "0 0 101 5", "-1 0 5 5", "nan 0 1 1", "0 0 inf 1", 5],
)
def test_bad_boxes_are_refused_with_an_example(text):
    with pytest.raises(PortraitError) as caught:
        request_from_values(panel(photos=HASH, region="Box", box=text))
    assert caught.value.field == "identities[0].region.box"


fractions = st.floats(0, 1, allow_nan=False)


@given(st.lists(fractions, min_size=4, max_size=4).filter(lambda b: b[0] < b[2] and b[1] < b[3]))
def test_a_box_survives_its_text_exactly(box):
    assert box_from_text(box_to_text(box), "box") == box


def test_boxes_read_well():
    assert box_to_text((0.0, 0.1, 0.3, 1.0)) == "0, 10, 30, 100"


def test_the_painted_part_is_the_mask():
    painted = png((0, 0, 0))
    painted.putpixel((3, 4), (255, 255, 255))
    request = request_from_values(
        panel(photos=HASH, region="mask", drawing={"image": png((9, 90, 200)), "mask": painted})
    )
    mask = Image.open(io.BytesIO(base64.b64decode(request["identities"][0]["region"]["mask"])))
    assert mask.getpixel((3, 4)) == 255 and mask.getextrema() == (0, 255) and mask.mode == "L"


def test_an_uploaded_mask_is_used_as_it_is():
    picture = png((0, 0, 0))
    picture.putpixel((1, 2), (255, 255, 255))
    request = request_from_values(panel(photos=HASH, region="mask", drawing={"image": picture, "mask": png((0, 0, 0))}))
    mask = Image.open(io.BytesIO(base64.b64decode(request["identities"][0]["region"]["mask"])))
    assert mask.getpixel((1, 2)) == 255


@pytest.mark.parametrize(
    "drawing",
    [None, {"image": png((0, 0, 0)), "mask": png((0, 0, 0))}, {"image": png((200, 30, 30)), "mask": png((0, 0, 0))}],
    ids=["nothing", "blank canvas", "photo without paint"],
)
def test_a_mask_nobody_painted_is_refused(drawing):
    with pytest.raises(PortraitError, match="nothing is painted"):
        request_from_values(panel(photos=HASH, region="Drawn mask", drawing=drawing))


def test_paint_counts_before_the_kept_mask():
    white = png((255, 255, 255))
    request = request_from_values(
        panel(photos=HASH, region="mask", mask=f'["{HASH}"]', drawing={"image": white, "mask": white})
    )
    assert request["identities"][0]["region"]["mask"] != HASH
    request = request_from_values(panel(photos=HASH, region="mask", mask=f'["{HASH}"]'))
    assert request["identities"][0]["region"]["mask"] == HASH


def test_masks_of_api_users():
    request = parse_request(request_from_values(panel(photos=HASH, region="mask", drawing="QUJD")))
    assert request.identities[0].region.mask.data == b"ABC"
    request = parse_request(
        request_from_values(panel(photos=HASH, region="mask", drawing={"image": "QQ==", "mask": "QUJD"}))
    )
    assert request.identities[0].region.mask.data == b"ABC"


def test_an_unknown_region_is_refused():
    with pytest.raises(PortraitError, match="automatic, box, mask"):
        request_from_values(panel(photos=HASH, region="circle"))


def test_a_region_not_chosen_is_not_read():
    request = request_from_values(
        panel(photos=HASH, region="automatic", box="nonsense", drawing={"image": 3, "mask": 3})
    )
    assert "region" not in request["identities"][0]


# ------------------------------------------------------------------------------------------------- request to values

hashes = st.binary(min_size=1, max_size=8).map(lambda data: Photo.of(data).sha256)
photos = st.builds(Photo, hashes, st.none(), st.none() | st.integers(0, 40), st.booleans())
photo_lists = st.lists(photos, min_size=1, max_size=3).map(tuple)
boxes = st.lists(fractions, min_size=4, max_size=4).filter(lambda b: b[0] < b[2] and b[1] < b[3]).map(tuple)
regions = st.none() | st.builds(Region, box=boxes) | st.builds(Region, mask=photos)
identities = st.builds(
    Identity,
    photos=photo_lists,
    start=st.floats(0, 0.4),
    end=st.floats(0.5, 1),
    region=regions,
    mix=st.lists(st.builds(Mix, photo_lists, st.floats(0, 0.5)), max_size=2).map(tuple),
    options=st.fixed_dictionaries({"scale": st.floats(0, 2), "structure": st.floats(0, 2)}),
)
requests = st.builds(
    PortraitRequest,
    identities=st.lists(identities, min_size=1, max_size=4).map(tuple),
    checkpoint=st.sampled_from(["automatic", "sd15", "a b"]),
    options=st.fixed_dictionaries(
        {"scale": st.floats(0, 2), "lora_scale": st.floats(0, 2), "show_routing": st.booleans()}
    ),
)


@settings(max_examples=200, deadline=None)
@given(requests)
def test_a_request_survives_the_panel(request):
    values, lost = values_from_request(request, 4)
    assert lost == []
    assert len(values) == len(panel_values.controls(4))
    tabs, form = read_form(values, Limits())
    assert tabs == list(range(1, len(request.identities) + 1)) or not request.enabled
    assert parse_request(form) == request


def test_values_have_the_types_that_the_api_turns_them_into():
    plain, _ = values_from_request(PortraitRequest(), 1)
    for value, default in zip(
        values_from_request(PortraitRequest(identities=(Identity((Photo(64 * "a"),)),)), 1)[0], plain
    ):
        assert value is None or type(value) is type(default)


def test_what_the_panel_has_no_place_for_is_said():
    mixes = tuple(Mix((Photo(64 * "b"),), 0.1) for _ in range(3))
    request = PortraitRequest(identities=tuple(Identity((Photo(64 * "a"),), mix=mixes) for _ in range(3)))
    values, lost = values_from_request(request, 2)
    assert len(values) == len(panel_values.controls(2))
    assert [("has 3 people" in text, "mixes 3" in text) for text in lost] == [
        (True, False),
        (False, True),
        (False, True),
    ]


def test_each_photo_keeps_its_own_face():
    photos = (Photo(64 * "a", face=1), Photo(64 * "b", face=1), Photo(64 * "c", aligned=True), Photo(64 * "d"))
    values, _ = values_from_request(PortraitRequest(identities=(Identity(photos),)), 1)
    block = dict(zip(panel_values.IDENTITY_FIELDS, values[len(panel_values.GLOBAL_FIELDS) :]))
    assert json.loads(block["photos"]) == [
        {"image": "sha256:" + 64 * "a", "face": 1},
        {"image": "sha256:" + 64 * "b", "face": 1},
        {"image": "sha256:" + 64 * "c", "aligned": True},
        "sha256:" + 64 * "d",
    ]
    assert (block["face"], block["aligned"]) == (inputs.LARGEST_NAME, False)


# ------------------------------------------------------------------------------------------------- nothing is dropped


def test_the_control_after_the_last_is_taken_off():
    values = panel(2)
    own, further = divided(sent(values))
    assert own == values and set(further) == set(panel_values.further_controls(2))


@pytest.mark.parametrize("beyond", [None, [HASH], "x", False])
def test_a_list_longer_than_the_panel_is_refused(beyond):
    with pytest.raises(PortraitError, match="2 people") as caught:
        divided(sent(panel(2), beyond))
    assert caught.value.field == f"args[{len(panel(2))}]"
    assert "identities" in caught.value.remedy


@pytest.mark.parametrize("second", [{"identities": []}, {"nonsense": 1}, {}, [{"identities": []}]])
@pytest.mark.parametrize("place", [1, 7, -1])
def test_nothing_stands_beside_a_request_object(second, place):
    values = sent([{"identities": [{"photos": [HASH]}]}, *panel(1)[1:]])
    assert divided(values)[0][0] is values[0]
    values[place] = second
    with pytest.raises(PortraitError, match="one request object") as caught:
        divided(values)
    assert '{"identities": [{...}, {...}]}' in caught.value.remedy
