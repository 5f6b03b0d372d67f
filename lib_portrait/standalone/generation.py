"""What `portrait.py generate` does once its arguments are understood: draw, measure, write, tell where it is."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFont

from lib_portrait.attention import RoutingMaps
from lib_portrait.checkpoints.store import Folders, Store
from lib_portrait.conditioning import Conditioner, Conditioning
from lib_portrait.control_picture import to_image
from lib_portrait.errors import Notice, PortraitError
from lib_portrait.faces.heatmap_detector import open_detector
from lib_portrait.faces.images import decode_photo
from lib_portrait.faces.service import FaceService
from lib_portrait.guidance.options import SHOW
from lib_portrait.guidance.reference import GuidedStep
from lib_portrait.guidance_picture import draw_guidance
from lib_portrait.methods.declarations import adapter_files, declaration
from lib_portrait.request import AUTOMATIC, Limits, PortraitRequest, Region, to_json
from lib_portrait.routing_picture import Legend, draw_routing
from lib_portrait.standalone.control import Control, KitControls
from lib_portrait.standalone.measuring import FaceSimilarity, Measurer, owners_of, shows_everybody
from lib_portrait.standalone.model import load_model, text_encoder_of
from lib_portrait.standalone.samples import both_words, read_samples
from lib_portrait.standalone.sampling import Sampling, check, sample
from lib_portrait.standalone.sheet import Cell, Section, draw_sheet

CACHE = Path(__file__).resolve().parents[2] / ".cache"
# Four pictures of SD1.5's size.
PIXELS_AT_ONCE = 4 * 512 * 512
ACROSS = 4
# Boxes of two people side by side.
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))


@dataclass(frozen=True)
class GeneratedPicture:
    """One finished picture. routing: the same in grey, coloured by whom its parts were given to. guided: coloured by
    where reference guidance acted.

    owners: whose they are, see `owners_of`, where there are several people. control: what a ControlNet saw.
    """

    sampling: Sampling
    picture: Image.Image
    routing: Image.Image | None = None
    guided: Image.Image | None = None
    owners: torch.Tensor | None = None
    control: Image.Image | None = None


class PortraitPipeline:
    """A model and what is needed to put people into its pictures.

    folders: with adapters and face networks, in the order they are searched. device: "cpu", "cuda" or "mps", None for
    the best there is. tell: told once what a user should know of a request. filter_crops: see
    `faces.alignment.align_face`. Raises PortraitError: no such device, a
    checkpoint that `load_model` refuses.
    """

    def __init__(
        self,
        checkpoint: Path,
        folders: Sequence[Path],
        device: str | None = None,
        tell: Callable[[Notice], None] = lambda notice: say(str(notice)),
        filter_crops: bool = False,
    ):
        self.checkpoint = checkpoint
        self.notices: list[Notice] = []
        self._tell = tell
        self.device = _device(device)
        # On other devices float16 is slower, or does not hold what SD1.5's attention needs.
        self.dtype = torch.float16 if self.device == "cuda" else torch.float32
        say(f"Loading {checkpoint.name} ({self.device})")
        self.model = load_model(checkpoint, self.device, self.dtype)
        self.store = Store(Folders(own=folders), adapter_files(), CACHE)
        self.faces = FaceService(
            self.store.folders("detector"),
            CACHE,
            Limits(),
            filter_crops=filter_crops,
            parser=lambda: self.store.published("parser"),
        )
        self.conditioner = Conditioner(self.faces, self.store)
        self.pose: np.ndarray | None = None
        """What the kit's ControlNet is shown, (H, W, 3) uint8, without circles: a picture of `control_picture`."""
        self._controls = KitControls()

    def sampling(self, prompt: str, settings: Mapping[str, Any]) -> Sampling:
        """A picture of the model's own size, but for what the settings say."""
        return Sampling(prompt, **{"width": self.model.size, "height": self.model.size, **settings})

    def generate(
        self, request: PortraitRequest | None, samplings: Sequence[Sampling], names: Sequence[str] = ()
    ) -> list[GeneratedPicture]:
        """The pictures, with the request's people in all of them. names: theirs, for the legend of routing maps.

        Raises PortraitError.
        """
        check(samplings)
        first = samplings[0]
        conditioning = None
        if request is not None:
            size = first.width, first.height
            conditioning = self.conditioner.prepare(request, size, self.device, self.dtype, base=self.checkpoint)
            self._notice([*self._choices(request), *conditioning.notices])
        control = None
        if conditioning is not None:
            control = self._controlled(conditioning, (first.width, first.height))
        shows = request is not None and request.shows_control
        seen = Image.fromarray(to_image(control.picture)) if control is not None and shows else None
        legend = Legend(names, range(1, len(names) + 1), ImageFont.load_default)
        at_once = max(1, PIXELS_AT_ONCE // (first.width * first.height))
        drawn: list[GeneratedPicture] = []
        for begin in range(0, len(samplings), at_once):
            batch = samplings[begin : begin + at_once]
            # Of several people it is measured whether they are where they were routed.
            routing = RoutingMaps() if request is not None and _routed(request) else None
            title = f"Drawing {begin + 1} to {begin + len(batch)} of {len(samplings)}"
            steps: list[GuidedStep] = []

            def told(done: Sequence[GuidedStep], notices: Sequence[Notice]) -> None:
                steps.extend(done)  # noqa: B023
                self._notice(notices)

            pixels = sample(self.model, batch, conditioning, routing, Progress(title), told, control)
            pictures = [Image.fromarray(one) for one in pixels]
            mean = routing.mean() if routing is not None else None
            maps: Sequence[Image.Image | None] = [None] * len(pictures)
            owners: Sequence[torch.Tensor | None] = [None] * len(pictures)
            guided: Sequence[Image.Image | None] = [None] * len(pictures)
            if conditioning is not None and conditioning.request.guidance.values({})[SHOW.name]:
                guided = [
                    draw_guidance(picture, own, legend) if (own := [one for one in steps if one.picture == i]) else None
                    for i, picture in enumerate(pictures)
                ]
            if mean is not None and request is not None and request.shows_maps:
                maps = draw_routing(pictures, list(mean), legend=legend)
            if mean is not None and mean.shape[1] > 1:
                owners = [owners_of(own) for own in mean]
            drawn += [GeneratedPicture(*one, seen) for one in zip(batch, pictures, maps, guided, owners, strict=True)]
        return drawn

    def show_pose(self, path: Path) -> None:
        """Has the kit's ControlNet see this picture. Raises PortraitError for one that cannot be read."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PortraitError(
                "--pose", f"{path} cannot be read ({error.strerror})", "Give the path of a picture.", 404
            ) from None
        self.pose = decode_photo(data, "--pose", self.faces.limits)[0]

    def _controlled(self, conditioning: Conditioning, size: tuple[int, int]) -> Control | None:
        """The ControlNet that the kit names, and the pose with everybody's circles; None where there is neither.

        Raises PortraitError for a pose of another shape than (width, height), one that nothing reads, and a ControlNet
        that is not there.
        """
        if self.pose is None:
            if conditioning.kit.manifest is not None and conditioning.kit.manifest.control is not None:
                self._notice([Notice("--pose", "there is none, so people are carried by the UNet's attention alone")])
            return None
        height, width = self.pose.shape[:2]
        if (width, height) != size:
            raise PortraitError(
                "--pose", f"it is {width}x{height}, the picture {size[0]}x{size[1]}", "Give one of the picture's size."
            )
        return self._controls.control(conditioning, self.store, self.model, self.pose, "--pose")

    def _notice(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            if notice not in self.notices:
                self.notices.append(notice)
                self._tell(notice)

    def _choices(self, request: PortraitRequest) -> list[Notice]:
        """Which face is taken of photos with several, where the request leaves it open."""
        notices = []
        for i, identity in enumerate(request.identities):
            groups = {f"identities[{i}]": identity.photos}
            groups |= {f"identities[{i}].mix[{m}]": mix.photos for m, mix in enumerate(identity.mix)}
            for place, photos in groups.items():
                for j, photo in enumerate(photos):
                    field = f"{place}.photos[{j}]"
                    count = 1 if photo.aligned or photo.face is not None else len(self.faces.find(photo, field))
                    if count > 1:
                        text = f"{count} faces, the largest is taken; #0 to #{count - 1} behind the file's name"
                        notices.append(Notice(field, f"{text} choose one, counted from the left"))
        return notices

    def resolved(self, request: PortraitRequest) -> PortraitRequest:
        """The request with the adapter that *automatic* means for this checkpoint, and with what kits say of reference
        guidance."""
        if request.checkpoint == AUTOMATIC and request.declaration.has_adapter:
            name = self.store.automatic(self.checkpoint, text_encoder_of(self.model.text_encoder), request.method)
            request = replace(request, checkpoint=name)
        return self.conditioner.resolved(request, self.checkpoint)

    def crops(self, request: PortraitRequest) -> list[list[np.ndarray]]:
        """The aligned faces of every identity's photos. Raises PortraitError where one has none."""
        return [
            [self.faces.crop(photo, f"identities[{i}].photos[{j}]") for j, photo in enumerate(identity.photos)]
            for i, identity in enumerate(request.identities)
        ]

    def comparison(self, request: PortraitRequest, crops: Sequence[Sequence[np.ndarray]]) -> Comparison:
        """What holds pictures against the request's people, whose aligned faces are given.

        That is the network that the adapter's kit names for it. Where it names none there is none: the one that
        conditions would find its own mark in every picture.
        """
        kit = self.conditioner.kit(request)
        manifest, home = kit.manifest, kit.home
        if not request.declaration.has_adapter:
            manifest, home = self.store.trained_on(self.checkpoint), self.checkpoint.parent
        if manifest is None or manifest.measuring is None or manifest.detector is None:
            whose = kit.name if request.declaration.has_adapter else self.checkpoint.name
            return Comparison(f"similarity not measured: {whose} comes without a network for it")
        measuring, detector = (self.store.locate(file, home) for file in (manifest.measuring, manifest.detector))
        if measuring is None or detector is None:
            missing = manifest.measuring if measuring is None else manifest.detector
            return Comparison(f"similarity not measured: {missing.name} is not there; get the kit anew")
        # Detectors made for photographs miss faces of other kinds of pictures.
        measurer = Measurer.load(measuring, open_detector(str(detector), self.store.folders("detector")))
        note = f"similarity measured by {measuring.name}, which took no part in drawing"
        return Comparison(note, measurer, measurer.references(crops))


@dataclass(frozen=True)
class Comparison:
    """Holds pictures against a run's people. note: what with, or why not.

    references: (n, D), one embedding a person.
    """

    note: str
    measurer: Measurer | None = None
    references: torch.Tensor | None = None

    def similarities(
        self, picture: Image.Image, people: Sequence[int], owners: torch.Tensor | None = None
    ) -> list[FaceSimilarity]:
        """Of each of the people whom the picture was asked to show; nothing where nothing measures.

        owners: see `Measurer.similarities`.
        """
        if self.measurer is None or self.references is None:
            return []
        return self.measurer.similarities(np.asarray(picture.convert("RGB")), self.references, people, owners)


def _routed(request: PortraitRequest) -> bool:
    return bool(request.declaration.maps) and (request.shows_maps or len(request.identities) > 1)


def _device(asked: str | None) -> str:
    """The device asked for, or the best there is. Raises PortraitError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    best = next(name for name, usable in there.items() if usable)
    if asked is not None and not there.get(asked, False):
        raise PortraitError("--device", f"this machine has no {asked} that torch can use", f"Leave it out for {best}.")
    return asked or best


def bundled_checkpoint(folders: Sequence[Path]) -> Path:
    """The checkpoint of the first kit in these folders that brings one. Raises PortraitError (404) when none does."""
    store = Store(Folders(own=folders), adapter_files())
    found = next(store.bundled(), None)
    if found is None:
        raise PortraitError(
            "checkpoint",
            f"no kit with a checkpoint is in {', '.join(map(str, folders))}",
            "Give a --checkpoint of your own; or get the embedded kit back with `git checkout models`.",
            404,
        )
    return found[1]


# -------------------------------------------------------------------------------------------------------------- results


class Results:
    """A new folder with the pictures of one run, its sheet and its settings."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pictures: list[dict[str, Any]] = []

    @staticmethod
    @contextlib.contextmanager
    def begin(output: Path) -> Iterator[Results]:
        """In a number below `output` that no run has used yet; left out again where nothing is written into it.

        Raises PortraitError (507).
        """
        try:
            output.mkdir(parents=True, exist_ok=True)
            taken = [int(path.name) for path in output.iterdir() if re.fullmatch(r"\d{1,9}", path.name)]
            folder = output / f"{max(taken, default=0) + 1:04}"
            folder.mkdir()
        except OSError as error:
            raise PortraitError(
                "--output", f"{output} cannot be written ({error})", "Give another folder.", 507
            ) from None
        try:
            yield Results(folder)
        finally:
            if not any(folder.iterdir()):
                folder.rmdir()

    def add(self, drawn: GeneratedPicture, people: Sequence[str] = (), measured: Sequence[FaceSimilarity] = ()) -> None:
        """Writes a picture and remembers what it was made with. people: their names, in the order of `measured`."""
        name = f"{len(self.pictures) + 1:03}"
        drawn.picture.save(self.folder / f"{name}.png")
        entry: dict[str, Any] = {"file": f"{name}.png", **asdict(drawn.sampling), "people": list(people)}
        if drawn.routing is not None:
            entry["routing"] = f"{name}-routing.png"
            drawn.routing.save(self.folder / entry["routing"])
        if drawn.guided is not None:
            entry["guided"] = f"{name}-guided.png"
            drawn.guided.save(self.folder / entry["guided"])
        if drawn.control is not None:
            entry["control"] = f"{name}-control.png"
            drawn.control.save(self.folder / entry["control"])
        if measured:
            entry["similarity"] = [asdict(one) for one in measured]
        if len(measured) > 1:
            entry["shows_everybody"] = shows_everybody(measured)
        self.pictures.append(entry)

    def summary(self) -> str | None:
        """The measurements in one sentence, or None where nothing was measured."""
        measured = [one for entry in self.pictures for one in entry.get("similarity", [])]
        if not measured:
            return None
        own = [one["own"] for one in measured if one["own"] is not None]
        others = [one["others"] for one in measured if one["others"] is not None]
        text = f"{len(own)} of {len(measured)} faces found"
        if own:
            text += f"; similarity to the reference {np.mean(own):.2f} on average"
        if others:
            text += f", to the most similar other person {np.mean(others):.2f}"
        several = [entry for entry in self.pictures if "shows_everybody" in entry]
        if several:
            shown = sum(entry["shows_everybody"] for entry in several)
            pairs = all(len(entry["similarity"]) == 2 for entry in several)
            what, whom = ("pairs", "both people") if pairs else ("pictures of several people", "everybody")
            routed = any(one["placed"] is not None for entry in several for one in entry["similarity"])
            text += f"; {shown} of {len(several)} {what} show {whom}" + (" where they were routed" if routed else "")
        return text

    def finish(self, title: str, sections: Sequence[Section], facts: Mapping[str, Any]) -> None:
        """Writes sheet.png and settings.json, and tells where everything is."""
        summary = self.summary()
        kept = {**facts, "summary": summary, "pictures": self.pictures}
        (self.folder / "settings.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False), "utf-8")
        notes = [", ".join(f"{name} {facts[name]}" for name in ("checkpoint", "adapter", "device") if name in facts)]
        first = self.pictures[0]
        told = [f"{first['width']}x{first['height']}", f"{first['steps']} steps of {first['sampler']}"]
        notes.append(", ".join([*told, f"guidance {first['guidance']:g}", *_options_said(facts)]))
        measured = [f"{text[0].upper()}{text[1:]}." for text in (summary, facts.get("measuring")) if text]
        notes.append(" ".join(measured))
        draw_sheet(title, notes, sections).save(self.folder / "sheet.png")
        for text in measured:
            print(text)
        print(f"Sheet:    {self.folder / 'sheet.png'}")
        print(f"Pictures: {self.folder} ({len(self.pictures)}), settings and similarities in settings.json", flush=True)


def _facts(
    pipeline: PortraitPipeline, request: PortraitRequest | None, comparison: Comparison | None
) -> dict[str, Any]:
    facts: dict[str, Any] = {"checkpoint": pipeline.checkpoint.name, "device": pipeline.device}
    if request is not None:
        if request.declaration.has_adapter:
            facts["adapter"] = pipeline.conditioner.kit(request).name
        facts |= {
            "request": to_json(request),
            "method": request.method,
            **request.options,
            "filter_crops": pipeline.faces.filter_crops,
        }
    if comparison is not None:
        facts["measuring"] = comparison.note
    if pipeline.notices:
        facts["notices"] = [str(notice) for notice in pipeline.notices]
    return facts


def _options_said(facts: Mapping[str, Any]) -> list[str]:
    options = declaration(facts["method"]).options if "method" in facts else ()
    return [text for option in options if (text := option.said(facts[option.name]))]


# ------------------------------------------------------------------------------------------------------------ two ways


def generate_prompts(
    pipeline: PortraitPipeline,
    results: Results,
    settings: Mapping[str, Any],
    request: PortraitRequest | None,
    prompts: Sequence[str],
    count: int,
) -> None:
    """`count` pictures of every prompt with the request's people, into `results`. Raises PortraitError."""
    seed = settings.get("seed", 0)
    samplings = [
        pipeline.sampling(prompt, {**settings, "seed": seed + number}) for prompt in prompts for number in range(count)
    ]
    check(samplings)
    sections = []
    people: list[str] = []
    comparison = None
    if request is not None:
        request = pipeline.resolved(request)
        # What cannot be measured is found out before anything is drawn.
        crops = pipeline.crops(request)
        comparison = pipeline.comparison(request, crops)
        people = [f"person {i + 1}" for i in range(len(crops))]
        faces = [Cell(Image.fromarray(crop), [name]) for name, own in zip(people, crops, strict=True) for crop in own]
        sections.append(Section("References", _rows(faces)))
    drawn = pipeline.generate(request, samplings, people)
    cells: list[list[Cell]] = [[] for _ in prompts]
    for number, one in enumerate(drawn):
        measured = (
            comparison.similarities(one.picture, range(len(people)), one.owners) if comparison is not None else []
        )
        results.add(one, people, measured)
        row = cells[number // count]
        row.append(Cell(one.picture, [f"seed {one.sampling.seed}", *_told(people, measured)]))
        row += [Cell(shown) for shown in (one.routing, one.guided) if shown is not None]
    sections += [Section(prompt, _rows(row)) for prompt, row in zip(prompts, cells, strict=True)]
    results.finish("Portraits", sections, _facts(pipeline, request, comparison))


def generate_samples(
    pipeline: PortraitPipeline,
    results: Results,
    settings: Mapping[str, Any],
    ask: Callable[[list[dict[str, Any]]], PortraitRequest],
) -> None:
    """The sample people of the kit beside the checkpoint: each alone with several prompts, and pairs with their routing
    maps, or, where the method makes none, each in a half of the picture.

    ask: the request for people in their JSON form. Raises PortraitError.
    """
    samples = read_samples(pipeline.checkpoint.parent)
    people = samples.people
    identities = [{"photos": [base64.b64encode(one.photos[0].read_bytes()).decode()]} for one in people]
    everyone = pipeline.resolved(ask(identities))
    comparison = pipeline.comparison(everyone, pipeline.crops(everyone))

    def measured(one: GeneratedPicture, shown: Sequence[int]) -> list[str]:
        similarities = comparison.similarities(one.picture, shown, one.owners)
        results.add(one, [people[i].name for i in shown], similarities)
        return _told([people[i].name for i in shown] if len(shown) > 1 else [""], similarities)

    singles = []
    again = all(len(one.photos) > 1 for one in people)
    for i, person in enumerate(people):
        row = [Cell(_opened(person.photos[0]), [f"reference: {person.name}"])]
        if again:
            # What the measuring network makes of a real photo: more likeness cannot be expected.
            other = _opened(person.photos[1])
            row.append(Cell(other, _told([""], comparison.similarities(other, [i]))))
        request = replace(everyone, identities=(everyone.identities[i],))
        prompts = [prompt.format(word=person.word) for prompt in samples.one]
        drawn = pipeline.generate(request, [pipeline.sampling(prompt, settings) for prompt in prompts])
        singles.append([*row, *(Cell(one.picture, measured(one, [i])) for one in drawn)])
    pairs, routed = [], bool(everyone.declaration.maps)
    for i, j in zip(range(0, len(people), 2), range(1, len(people), 2)):
        pair = [everyone.identities[i], everyone.identities[j]]
        if not routed:
            pair = [replace(one, region=Region(box=half)) for one, half in zip(pair, HALVES)]
        request = replace(everyone, identities=tuple(pair)).with_maps()
        both = both_words(people[i].word, people[j].word, everyone.declaration.names_each)
        prompts = [prompt.format(both=both) for prompt in samples.two]
        row = [Cell(_opened(people[k].photos[0]), [f"reference: {people[k].name}"]) for k in (i, j)]
        names = [people[i].name, people[j].name]
        for one in pipeline.generate(request, [pipeline.sampling(prompt, settings) for prompt in prompts], names):
            row.append(Cell(one.picture, measured(one, [i, j])))
            if one.routing is not None:
                row.append(Cell(one.routing))
        pairs.append(row)
    general = [prompt.replace("{word}", "…") for prompt in samples.one]
    before = ["", "another photo of this person"] if again else [""]
    sections = [Section("One person", singles, [*before, *general])]
    if pairs:
        maps = ["who was put where"] if routed else []
        general = [text for prompt in samples.two for text in (prompt.replace("{both}", "…"), *maps)]
        sections.append(Section("Two people", pairs, ["", "", *general]))
    results.finish(samples.title, sections, _facts(pipeline, everyone, comparison))


def _opened(photo: Path) -> Image.Image:
    with Image.open(photo) as picture:
        return picture.convert("RGB")


def _told(people: Sequence[str], measured: Sequence[FaceSimilarity]) -> list[str]:
    lines = []
    for name, one in zip(people, measured):
        before = f"{name}: " if name else ""
        if one.own is None:
            lines.append(f"{before}no face found")
        else:
            others = f" (others up to {one.others:.2f})" if one.others is not None else ""
            wrong = ", not where routed" if one.placed is False else ""
            if not one.recognised:
                wrong = ", more like somebody else of the picture"
            lines.append(f"{before}similarity {one.own:.2f}{others}{wrong}")
    return lines


def _rows(cells: Sequence[Cell]) -> list[Sequence[Cell]]:
    return [cells[begin : begin + ACROSS] for begin in range(0, len(cells), ACROSS)]


# -------------------------------------------------------------------------------------------------------------- telling


class Progress:
    """Shows how far a batch is: one line rewritten on a terminal, in a log a line when it is done."""

    def __init__(self, title: str):
        self._title = title
        self._began = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, of: int) -> None:
        finished = done == of
        if self._terminal or finished:
            text = f"{self._title}: step {done} of {of}, {time.monotonic() - self._began:.0f} s"
            start = "\r" if self._terminal else ""
            print(start + text, end="\n" if finished or not self._terminal else "", file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
