"""An evaluation from its settings to its files."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib_portrait import __version__
from lib_portrait.checkpoints.formats import read_header, read_tensors
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.kit import ALONE, StoredFile, read_manifest
from lib_portrait.checkpoints.store import Folders, Kit, Store
from lib_portrait.conditioning import Conditioner
from lib_portrait.errors import PortraitError
from lib_portrait.faces.detection import DETECTORS, Detector
from lib_portrait.faces.heatmap_detector import open_detector
from lib_portrait.faces.recognition import backbone_from_state_dict
from lib_portrait.faces.service import FaceService
from lib_portrait.guidance.options import BEGIN, NOISE, REFERENCE_T, STRENGTH
from lib_portrait.methods.declarations import Declaration, adapter_files, declaration, declarations
from lib_portrait.options import Switch, Value
from lib_portrait.request import AUTOMATIC, Guidance
from lib_portrait.standalone.model import Model, load_model
from trainer.attribute_network import AttributeNetwork
from trainer.evaluation.generators import (
    Generator,
    GlobalFeatureService,
    PictureCache,
    SampleProvider,
    SamplingSettings,
    StandaloneGenerator,
)
from trainer.evaluation.instruments import load_clip, open_recogniser, refuse_conditioning_network
from trainer.evaluation.measuring import CLIP, Gallery, Instruments, measure
from trainer.evaluation.plans import BRIEF, REAL, Adapter, EvaluationPlan, ProtocolSettings, make_plans
from trainer.evaluation.plots import sweep_plot
from trainer.evaluation.populations import HELD_OUT, TRAINED, PhotoFolder, Population, WorldPopulation
from trainer.evaluation.report import Table, across, as_json, as_json_lines, markdown, sample_sheet, tabulate

MODELS = Path(__file__).resolve().parents[2] / "models"
# The kit of the drawn people: what they are drawn and measured with where nothing else is said.
WORLD = MODELS / "world"
# People of the gallery, so that chance is 1 % at most.
GALLERY = 100
MOST_PROCESSES = 4
# The method that draws nobody by itself.
BARE = next(one.name for one in declarations() if not one.has_adapter)
# u and t0 of OmniPortrait's figures 7 and 14, and factors of p.
SWEPT_BEGIN: tuple[Value, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
SWEPT_T0: tuple[Value, ...] = (271.0, 471.0, 671.0, 871.0)
SWEPT_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Weights of a UNet that is small enough to be in memory several times; Stable Diffusion 1's has 860 million.
SMALL = 100e6


@dataclass(frozen=True)
class EvaluationSettings:
    """All that decides an evaluation.

    protocols: of PROTOCOLS. checkpoint: a single-file SD1 model. adapters: "NAME", "FOLDER" or "LABEL=FOLDER", a folder
    holding one adapter. options: of their methods, NAME=VALUE each. people: HELD_OUT or TRAINED people of the world, or
    a folder of photos. gallery: at least how many people of the world. size: 0 for the checkpoint's own. detector,
    recogniser, clip, attributes: see `instruments`; for people of the world the world's own by default; attributes ""
    for none. fid: whose features, CLIP or FACE. processes: how many generate at once, 0 for as many as suit the machine
    and the model. kit: the folder of the world's kit.
    """

    output: Path
    protocols: tuple[str, ...]
    checkpoint: Path = field(default_factory=lambda: _named_file("base"))
    adapters: tuple[str, ...] = field(default_factory=lambda: (read_manifest(WORLD / ALONE).name,))
    people: str = HELD_OUT
    gallery: int = GALLERY
    protocol_settings: ProtocolSettings = field(default_factory=ProtocolSettings)
    size: int = 0
    steps: int = 20
    guidance: float = 5.0
    sampler: str = "ddim"
    negative_prompt: str = ""
    scale: float = 0.7
    options: tuple[str, ...] = ()
    batch: int = 8
    detector: str = ""
    recogniser: str = ""
    clip: str = ""
    attributes: str | None = None
    fid: str = CLIP
    device: str = "cpu"
    processes: int = 0
    kit: Path = field(default_factory=lambda: WORLD)


def of_kit(folder: Path) -> dict[str, Any]:
    """What a world's kit decides of the settings: its checkpoint, and its adapter. Raises PortraitError."""
    return {"checkpoint": _named_file("base", folder), "adapters": (read_manifest(folder / ALONE).name,)}


def evaluate(settings: EvaluationSettings, say: Callable[[str], object] = print) -> list[Table]:
    """Generates, measures and writes OUTPUT/PROTOCOL.{md,json,jsonl,png}; goes on where an earlier call was broken off.

    Of a protocol in several parts these are PROTOCOL-PART, and PROTOCOL.md has all of them; PROTOCOL-PART-plot.png is
    the plot of a sweep.
    Raises PortraitError for anything that is missing or does not fit, as far as possible before the first picture.
    """
    prepared = prepare(settings)
    instruments = open_instruments(settings, prepared.model)
    for kit in prepared.kits.values():
        for role in kit.files.keys() & {"backbone"}:
            refuse_conditioning_network(instruments.recogniser, kit.files[role])
    missing = sum(prepared.provider.missing(row, one.samples) for one in prepared.plans for row in one.variants)
    processes = settings.processes or _default_processes(prepared.model)
    # To start a process takes as long as to generate a few pictures.
    if processes > 1 and missing > processes * settings.batch:
        say(f"{missing} pictures are generated by {processes} processes; the bars show the share of the first one.")
        _generate_in_processes(settings, processes)
    facts = {"weights": {**prepared.weights, "instruments": _instrument_hashes(settings)}}
    tables = [
        evaluate_plan(
            one, prepared.provider, instruments, facts | _facts(settings, prepared, one), settings.output, say
        )
        for one in prepared.plans
    ]
    for protocol in settings.protocols:
        parts = [table for table in tables if table.plan.protocol == protocol and table.plan.part]
        if not parts:
            continue
        text = across(parts) if protocol == "groups" else "\n".join(map(markdown, parts))
        (settings.output / f"{protocol}.md").write_text(text, "utf-8")
        if protocol == "groups":
            say(text)
    return tables


@dataclass(frozen=True)
class Prepared:
    """What generates. kits: by the adapter's label. weights: hashes, by the adapter's label. guidance: what the kit of
    each adapter says of it, by label; nothing where nothing is guided."""

    model: Model
    provider: SampleProvider
    plans: list[EvaluationPlan]
    kits: dict[str, Kit]
    weights: dict[str, dict[str, str]]
    guidance: dict[str, Mapping[str, Value]]


def drawing_methods(settings: EvaluationSettings) -> dict[str, str]:
    """Of the adapters, as the settings name them, those that draw people without reference guidance, with their
    methods."""
    cache = settings.output / "cache"
    found = {text: _adapter(text, cache, settings.kit)[1][2] for text in settings.adapters}
    return {text: method for text, method in found.items() if declaration(method).has_adapter}


def prepare(settings: EvaluationSettings) -> Prepared:
    """Everything that generates, and what is to be. Raises PortraitError as `evaluate` does."""
    for name, value in (("batch", settings.batch), ("gallery", settings.gallery)):
        if value < 1:
            raise PortraitError(name, f"{value} was given", "Give a whole number of 1 or more.")
    model = load_model(settings.checkpoint, settings.device)
    cache = settings.output / "cache"
    hashes = {"checkpoint": file_sha256(settings.checkpoint, cache)}
    description = settings.checkpoint.with_suffix(".yaml")
    if description.is_file():
        hashes["yaml"] = file_sha256(description)
    asked = list(settings.adapters)
    if settings.protocol_settings.reference_guidance is not None and BARE not in asked:
        asked.append(BARE)
    stores = dict(_adapter(text, cache, settings.kit) for text in asked)
    if len(stores) < len(asked):
        raise PortraitError("adapter", "two have the same label", "Give them labels: --adapter LABEL=FOLDER.")
    generators: dict[str | None, Generator] = {None: StandaloneGenerator(model, hashes, None)}
    kits = {label: _kit(store, name, method) for label, (store, name, method) in stores.items()}
    for label, (store, name, method) in stores.items():
        faces = _face_service(kits[label], cache, _reference_detector(settings))
        conditioner = Conditioner(faces, store)
        generators[label] = StandaloneGenerator(model, hashes, conditioner, name, method, settings.checkpoint)
    guidance: dict[str, Mapping[str, Value]] = {}
    if settings.protocol_settings.reference_guidance is not None or "guidance" in settings.protocols:
        for label, (store, _, _) in stores.items():
            guidance[label] = store.guidance(kits[label].manifest, settings.checkpoint)
    sampling = SamplingSettings(
        settings.size or model.size,
        settings.steps,
        settings.guidance,
        settings.sampler,
        settings.negative_prompt,
        settings.scale,
        settings.batch,
        _options(settings.options, [declaration(kit.method) for kit in kits.values()]),
    )
    population = open_population(settings, sampling.size)
    provider = SampleProvider(population, generators, sampling, PictureCache(settings.output / "pictures"))
    adapters = [_planned(label, declaration(kit.method)) for label, kit in kits.items()]
    chosen = _protocol_settings(settings)
    # What draws nobody by itself is swept where it was asked for by name, or there is nothing else.
    swept = [one for one in adapters if one.draws or BARE in settings.adapters]
    if "guidance" in settings.protocols and not chosen.sweeps:
        chosen = dataclasses.replace(chosen, sweeps=_usual_sweeps(chosen, next(iter(guidance.values()))))
    # Everything that could be wrong with one of the protocols comes to light before the first picture of any.
    plans = [
        plan
        for protocol in settings.protocols
        for plan in make_plans(protocol, population.people, swept if protocol == "guidance" else adapters, chosen)
    ]
    people = max(len(sample.people) for plan in plans for sample in plan.samples)
    weights = {"text only": hashes, **{label: dict(generators[label].weights(people)) for label in stores}}
    return Prepared(model, provider, plans, kits, weights, guidance)


def _planned(label: str, method: Declaration) -> Adapter:
    return Adapter(label, bool(method.control), method.names_each, method.has_adapter)


def _usual_sweeps(settings: ProtocolSettings, kit: Mapping[str, Value]) -> tuple[tuple[str, tuple[Value, ...]], ...]:
    """What is swept where nothing is said: u and t0 around the paper's values, and p around what it is otherwise; t0
    only where the reference is not to be noised as each step.

    kit: what the adapter's kit says of reference guidance.
    """
    strength = float(Guidance(True, settings.reference_guidance or {}).values(kit)[STRENGTH.name])
    strengths = (min(strength * factor, STRENGTH.high) for factor in SWEPT_FACTORS)
    sweeps = ((BEGIN.name, SWEPT_BEGIN), (STRENGTH.name, tuple(dict.fromkeys(strengths))))
    fixed = (settings.reference_guidance or {}).get(NOISE.name, NOISE.default) == NOISE.default
    return (*sweeps, (REFERENCE_T.name, SWEPT_T0)) if fixed else sweeps


def _options(texts: Sequence[str], methods: Sequence[Declaration]) -> dict[str, Value]:
    """The options that are given as NAME=VALUE. Raises PortraitError for one that none of the methods has."""
    declared = {one.name: one for method in methods for one in (*method.options, *method.identity_options)}
    chosen = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in declared:
            raise PortraitError("option", f"{name!r} is not known", f"Use one of: {', '.join(declared) or 'none'}.")
        try:
            chosen[name] = declared[name].check(declared[name].from_text(value), f"option {name}")
        except ValueError:
            remedy = "Give on or off." if isinstance(declared[name], Switch) else declared[name].help
            raise PortraitError(f"option {name}", f"{value!r} is no value of it", remedy) from None
    return chosen


def _kit(store: Store, name: str, method: str) -> Kit:
    """The files of an adapter; none where the method has no adapters."""
    return store.kit(name, method) if declaration(method).has_adapter else Kit(AUTOMATIC, method, {})


def _face_service(kit: Kit, cache: Path, detector: str | Detector) -> FaceService:
    """The face service that gives the features the adapter was trained on."""
    first = next(iter(kit.files.values()), None)
    if first is None or first.suffix != ".safetensors" or read_header(first)[1].get("components") != "global":
        return FaceService([MODELS], cache, detector=detector)
    faces = GlobalFeatureService([MODELS], cache, detector=detector)
    faces.backbone = backbone_from_state_dict(read_tensors(kit.files["backbone"], "backbone").tensors).float()
    return faces


def _default_processes(model: Model) -> int:
    """How many processes generate by default: one for each core, where a model is small enough to be there so often.

    The layers of such a model are too small to be worth sharing between cores.
    """
    small = sum(parameter.numel() for parameter in model.unet.parameters()) < SMALL
    return min(os.cpu_count() or 1, MOST_PROCESSES) if small and model.device.type == "cpu" else 1


def _generate_in_processes(settings: EvaluationSettings, processes: int) -> None:
    """Generates what the cache lacks, each process for its share of the people. Raises what one of them raises."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(_generate_share, settings, place, processes) for place in range(processes)]
        for problem in [share.result() for share in shares]:
            if problem is not None:
                raise PortraitError(*problem)


def _generate_share(settings: EvaluationSettings, place: int, processes: int) -> tuple[str, str, str] | None:
    """One process's share of the pictures; what went wrong, as a PortraitError's words."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    try:
        prepared = prepare(settings)
        for one in prepared.plans:
            groups = list(dict.fromkeys(sample.people for sample in one.samples))[place::processes]
            samples = [sample for sample in one.samples if sample.people in groups]
            variants = [variant for variant in one.variants if not variant.real]
            title = f"{one.name}: generating"
            with tqdm(total=len(samples) * len(variants), unit="picture", desc=title, disable=place > 0) as bar:
                for variant in variants:
                    prepared.provider.provide(variant, samples, bar.update)
    except PortraitError as error:
        return error.field, error.problem, error.remedy
    return None


def evaluate_plan(
    plan: EvaluationPlan,
    provider: SampleProvider,
    instruments: Instruments,
    facts: Mapping[str, Any],
    output: Path,
    say: Callable[[str], object] = print,
) -> Table:
    """Generates what is missing of a plan, measures all of it, and writes its files."""
    population = provider.population
    gallery = Gallery.of(population, plan.compared_photo, instruments)
    count = len(plan.samples)
    with tqdm(total=count * len(plan.variants), unit="picture", desc=f"{plan.name}: generating") as bar:
        paths = {variant.name: provider.provide(variant, plan.samples, bar.update) for variant in plan.variants}
    with tqdm(total=count * len(plan.variants), unit="picture", desc=f"{plan.name}: measuring") as bar:
        measurements = {
            variant.name: measure(
                paths[variant.name],
                plan.samples,
                gallery,
                instruments,
                population.follows_prompts or not variant.real,
                bar.update,
                [provider.boxes(variant, sample) for sample in plan.samples],
                population.drawn,
            )
            for variant in plan.variants
        }
    compared = provider.real(plan.samples, lambda number: None, repeat=1)
    # Where there is but one real picture of somebody, it is the same for all their samples.
    distinct = dict(zip(compared, plan.samples))
    real = [
        one.features
        for one in measure(list(distinct), list(distinct.values()), gallery, instruments, population.follows_prompts)
        if one.features is not None
    ]
    if not population.follows_prompts:
        # The same photos stand in that row: their distance to themselves says nothing.
        measurements[REAL] = [dataclasses.replace(one, features=None) for one in measurements[REAL]]
    notes = _notes(plan, population, instruments, len(gallery.embeddings), len(real))
    table = tabulate(plan, measurements, real, len(gallery.embeddings), notes)
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(table)
    (output / f"{plan.name}.md").write_text(text, "utf-8")
    (output / f"{plan.name}.json").write_text(as_json(table, facts), "utf-8")
    (output / f"{plan.name}.jsonl").write_text(as_json_lines(plan, measurements, paths, output), "utf-8")
    sample_sheet(plan, population, measurements, paths).save(output / f"{plan.name}.png")
    if plan.protocol == "guidance":
        sweep_plot(table).save(output / f"{plan.name}-plot.png")
    say(text)
    return table


def _notes(
    plan: EvaluationPlan, population: Population, instruments: Instruments, gallery: int, real: int
) -> list[str]:
    people = {person for sample in plan.samples for person in sample.people}
    groups = len({sample.people for sample in plan.samples})
    several = {"multi": "pairs", "groups": f"groups of {plan.part}"}.get(plan.protocol)
    pairs = f", {groups} {several}" if several is not None else ""
    held = "another photo than the references" if plan.compared_photo else "the reference"
    prompted = " Real pictures show what the prompt says." if population.follows_prompts else ""
    both = ""
    if plan.protocol == "multi":
        both = (
            " Both shown: each has a face of their own, more like them than like the other; "
            "both placed: and where the picture was routed to them."
        )
    if plan.protocol == "groups":
        both = (
            " All shown: each has a face of their own, more like them than like the picture's others; "
            "all placed: and where the picture was routed to them. Boxes hit: share of the places asked for that have "
            "a face, whoever's."
        )
    if population.drawn(0) is not None and all(len(sample.people) == 1 for sample in plan.samples):
        both += (
            " Moles kept: share of those that should be seen which are found, moles elsewhere: of as many mirrored "
            "places where there should be none. Freckles: how often the places for freckles are darker in a picture "
            "of somebody who has them than in one of somebody who has none (chance 50 %)."
        )
    if any(variant.guidance.enabled for variant in plan.variants):
        both += (
            " Guided: share of the people on whom reference guidance acted; whom it does not find is drawn without it."
        )
    if plan.names_each:
        both += ' Prompts name everybody by a word of their own, in all rows ("a woman and a woman").'
    return [
        f"{len(people)} {population.source}{pairs}, {len(plan.samples)} pictures a row; mean ± standard error over "
        f"people. Similarity is to {held}, by {instruments.recogniser.name}; a face that is not found counts 0. "
        f"Top-k: among {gallery} people (chance {100 / gallery:.3g} % for top-1). Faces by "
        f"{instruments.detector.name}, CLIP-T by {instruments.clip.name}. FID to {real} real pictures, from "
        f"{instruments.fid_features}.{both}{prompted}"
    ]


# ------------------------------------------------------------------------------------------------------------ settings


def open_population(settings: EvaluationSettings, size: int) -> Population:
    """The population: people of the world with a gallery of at least `settings.gallery`, or of a folder."""
    if _of_world(settings):
        numbers = [_protocol_settings(settings).counts(protocol).people for protocol in settings.protocols]
        return WorldPopulation(settings.people, max(*numbers, settings.gallery), size)
    folder = Path(settings.people)
    if not folder.is_dir():
        raise PortraitError(
            "people", f"there is no folder {folder}", f"Give {HELD_OUT}, {TRAINED} or a folder of photos."
        )
    detector = open_detector(_detector(settings), [MODELS])
    return PhotoFolder(folder, settings.protocol_settings.photos(settings.protocols), detector)


def _of_world(settings: EvaluationSettings) -> bool:
    return settings.people in (TRAINED, HELD_OUT)


def _protocol_settings(settings: EvaluationSettings) -> ProtocolSettings:
    """The protocols' settings, with the default sizes for these people."""
    given = settings.protocol_settings
    return dataclasses.replace(given, defaults=BRIEF) if _of_world(settings) else given


def open_instruments(settings: EvaluationSettings, model: Model) -> Instruments:
    """What measures, from the settings. Raises PortraitError for photographs whose instruments are not given."""
    attributes = _attributes(settings)
    return Instruments(
        open_detector(_detector(settings), [MODELS]),
        open_recogniser(Path(_recogniser(settings)), settings.device),
        load_clip(_clip(settings), model.text_encoder, model.tokenizer, settings.device),
        AttributeNetwork.load(Path(attributes)).to(settings.device) if attributes else None,
        settings.fid,
    )


def _detector(settings: EvaluationSettings) -> str:
    if settings.detector:
        return settings.detector
    own = _named_file("detector", settings.kit) if _of_world(settings) else None
    return str(own) if own is not None and own.is_file() else "mtcnn"


def _recogniser(settings: EvaluationSettings) -> str:
    return settings.recogniser or _world_file(settings, "recogniser", "measuring", "FaceNet's file")


def _clip(settings: EvaluationSettings) -> str:
    return settings.clip or _world_file(settings, "clip", "vision", "ViT-L-14:FILE")


def _attributes(settings: EvaluationSettings) -> str:
    if settings.attributes is not None:
        return settings.attributes
    return str(_named_file("attributes", settings.kit)) if _of_world(settings) else ""


def _named_file(role: str, folder: Path | None = None) -> Path:
    """The file that the world's kit, in that folder or where it ships, names for a role: an entry of the manifest, or
    one of its encoders.

    Raises PortraitError where it names none, and where the manifest cannot be read."""
    folder = folder or WORLD
    kit = read_manifest(folder / ALONE)
    file: StoredFile | None = kit.encoders.get(role) or getattr(kit, role, None)
    if file is None:
        raise PortraitError(role, f"the kit {kit.name} names none", "Get the kit anew: `git checkout models`.")
    return folder / file.name


def _world_file(settings: EvaluationSettings, name: str, role: str, real: str) -> str:
    """The file of the world's kit for a role. Raises PortraitError where the people are not the world's."""
    if not _of_world(settings):
        raise PortraitError(name, "the world's own does not know photographs", f"Give one that does, such as {real}.")
    return str(_named_file(role, settings.kit))


def _reference_detector(settings: EvaluationSettings) -> str | Detector:
    """The detector for reference photos that do not come aligned already."""
    chosen = _detector(settings)
    return chosen if chosen in DETECTORS else open_detector(chosen, [MODELS])


def _adapter(text: str, cache: Path, world: Path) -> tuple[str, tuple[Store, str, str]]:
    """The label of an adapter, the store that finds its files, its name there and its method. cache: for hashes.

    For what draws nobody without reference guidance the method's name stands in the place of an adapter's. world: the
    folder of the world's kit."""
    label, _, place = text.rpartition("=")
    if place == BARE:
        store = Store(Folders([world, MODELS]), adapter_files(), cache)
        return label or declaration(BARE).title.lower(), (store, AUTOMATIC, BARE)
    folder = Path(place)
    if not folder.is_dir():
        store = Store(Folders([world, MODELS]), adapter_files(), cache)
        return label or place, (store, place, store.kit(place).method)
    alone = Store(Folders([folder]), adapter_files())
    found = {(name, files.method) for files in adapter_files() for name in alone.names(files.method)}
    if len(found) != 1:
        what = f"holds {', '.join(sorted(name for name, _ in found))}" if found else "holds no adapter"
        raise PortraitError("adapter", f"{folder} {what}", "Give a folder with one adapter's files.")
    store = Store(Folders([folder, world, MODELS]), adapter_files(), cache)
    return label or folder.name, (store, *found.pop())


def _instrument_hashes(settings: EvaluationSettings) -> dict[str, str]:
    given = {
        "detector": _detector(settings),
        "recogniser": _recogniser(settings),
        "clip": _clip(settings).rpartition(":")[2],
        "attributes": _attributes(settings),
    }
    return {name: file_sha256(Path(text)) for name, text in given.items() if text and Path(text).is_file()}


def _facts(settings: EvaluationSettings, prepared: Prepared, plan: EvaluationPlan) -> dict[str, Any]:
    """What the JSON says beside the numbers. Files go by their names: their hashes stand beside them."""
    model, colon, file = _clip(settings).rpartition(":")
    files = {
        "checkpoint": settings.checkpoint.name,
        "detector": Path(_detector(settings)).name,
        "recogniser": Path(_recogniser(settings)).name,
        "clip": f"{model}{colon}{Path(file).name}",
        "attributes": Path(_attributes(settings)).name,
    }
    chosen = {
        "people": settings.people if _of_world(settings) else Path(settings.people).name,
        "adapters": list(prepared.kits),
        "fid": settings.fid,
        **files,
        "names_each": plan.names_each,
        "reference_guidance": {label: dict(values) for label, values in prepared.guidance.items()},
        "counts": dataclasses.asdict(_protocol_settings(settings).counts(plan.protocol)),
        **dataclasses.asdict(prepared.provider.settings),
    }
    return {
        "version": __version__,
        "settings": chosen,
        "made_with": {"torch": torch.__version__, "python": platform.python_version()},
    }
