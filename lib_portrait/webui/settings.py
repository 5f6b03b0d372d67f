"""Settings > Portrait, and what the rest reads from them."""

from __future__ import annotations

from pathlib import Path

from modules import shared
from modules.paths_internal import data_path, extensions_dir, models_path

from lib_portrait.checkpoints import Folders
from lib_portrait.request import Limits

SECTION = ("portrait", "Portrait")
AUTOMATIC_DETECTOR = "automatic"
DETECTORS = (AUTOMATIC_DETECTOR, "insightface", "mtcnn")
HIGHEST_IDENTITIES = 16
HIGHEST_MEGAPIXELS = 1000

# The extension's own folder: lib_portrait/webui/settings.py is three levels below it.
EXTENSION = Path(__file__).resolve().parents[2]


def on_ui_settings() -> None:
    """Adds the settings page; the host calls it each time it builds its interface."""
    import gradio as gr

    def add(name: str, info: shared.OptionInfo) -> None:
        shared.opts.add_option(f"portrait_{name}", info)

    def slider(default: int, label: str, low: int, high: int) -> shared.OptionInfo:
        return shared.OptionInfo(
            default, label, gr.Slider, {"minimum": low, "maximum": high, "step": 1}, section=SECTION
        )

    defaults = Limits()
    add(
        "model_folders",
        # Not settable over the API: it names folders that files are read from and written to.
        shared.OptionInfo(
            "", "Further model folders", gr.Textbox, {"lines": 2}, section=SECTION, restrict_api=True
        ).info("one per line; searched before models/Portrait and this extension's models folder"),
    )
    add(
        "max_identities",
        slider(defaults.identities, Limits.setting("identities"), 1, HIGHEST_IDENTITIES)
        .info("also the number of identity tabs in the panel")
        .needs_reload_ui(),
    )
    add("max_photos", slider(defaults.photos, Limits.setting("photos"), 1, 64))
    add("max_photo_mib", slider(defaults.photo_bytes // 2**20, Limits.setting("photo_bytes"), 1, 256))
    add(
        "max_photo_megapixels",
        slider(defaults.photo_pixels // 10**6, Limits.setting("photo_pixels"), 1, HIGHEST_MEGAPIXELS).info(
            "a photo takes about 8 MB of memory a megapixel while its faces are sought"
        ),
    )
    add(
        "cache_mib",
        slider(1024, "Photos and face features kept on disk, at most, in MiB", 64, 16384).info(
            "kept photos let generation parameters bring people back"
        ),
    )
    add(
        "detector",
        shared.OptionInfo(
            AUTOMATIC_DETECTOR, "Face detector", gr.Radio, {"choices": list(DETECTORS)}, section=SECTION
        ).info("automatic: insightface when it and its weights are there, else MTCNN"),
    )
    add(
        "filter_crops",
        shared.OptionInfo(False, "Smooth large faces when they are cut out", section=SECTION).info(
            "of faces larger than 224 pixels every pixel counts then; the published adapters were trained without"
        ),
    )
    add(
        "save_maps",
        shared.OptionInfo(False, "Save routing maps beside the pictures", section=SECTION).info(
            "where the panel's *Show routing map* is ticked; their file names end in -portrait-map"
        ),
    )


def _option(name: str, default: object) -> object:
    """A setting's value; the default until the host has called `on_ui_settings`."""
    value = getattr(shared.opts, f"portrait_{name}", None)
    return default if value is None else value


def _whole(name: str, default: int, low: int, high: int) -> int:
    """A number setting within its range, whatever stands in the host's config file."""
    value = _option(name, default)
    try:
        return min(max(int(value), low), high)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return default


def limits() -> Limits:
    """How much one request may ask for."""
    defaults = Limits()
    return Limits(
        identities=_whole("max_identities", defaults.identities, 1, HIGHEST_IDENTITIES),
        photos=_whole("max_photos", defaults.photos, 1, 64),
        photo_bytes=_whole("max_photo_mib", defaults.photo_bytes // 2**20, 1, 256) * 2**20,
        photo_pixels=_whole("max_photo_megapixels", defaults.photo_pixels // 10**6, 1, HIGHEST_MEGAPIXELS) * 10**6,
        page="Settings > Portrait",
    )


def folders() -> Folders:
    """Where weights are looked for: folders of the settings page, the WebUI's models/Portrait, this extension's models.

    In the last of these lies the embedded kit, in a folder of its own. Image encoders and detectors that ControlNet,
    IP-Adapter or another WebUI extension brought are found where those keep them, and the WebUI's own face parser.
    """
    models = Path(models_path)
    lines = str(_option("model_folders", "")).splitlines()
    further = [Path(line.strip()).expanduser() for line in lines if line.strip()]
    annotators = [Path(extensions_dir) / "sd-webui-controlnet" / "annotator" / "downloads"]
    chosen = _controlnet_annotators()
    if chosen is not None:
        annotators.insert(0, chosen)
    vision = [models / "clip_vision", *(folder / "clip_vision" for folder in annotators)]
    # Below each of these the detector looks into insightface's own subfolders too.
    detector = [models, models / "insightface", *annotators, Path.home() / ".insightface"]
    # Where the WebUI has facexlib put what face restoration fetches.
    restoration = [
        Path(getattr(shared.cmd_opts, f"{name.lower()}_models_path", models / name))
        for name in ("GFPGAN", "Codeformer")
    ]
    return Folders(
        own=[*further, models / "Portrait", EXTENSION / "models"],
        shared={"vision": vision, "detector": detector, "parser": restoration},
    )


def _controlnet_annotators() -> Path | None:
    """The folder that ControlNet was told to keep its preprocessors' weights in (annotator_path.py there), or None."""
    chosen = shared.opts.data.get("control_net_modules_path") or getattr(
        shared.cmd_opts, "controlnet_annotator_models_path", None
    )
    return Path(data_path) / str(chosen) if chosen else None


def cache_dir() -> Path:
    """Where photos, face features and file hashes are kept."""
    return Path(data_path) / "cache" / "portrait"


def cache_bytes() -> int:
    """How much `cache_dir` may hold."""
    return _whole("cache_mib", 1024, 64, 16384) * 2**20


def filter_crops() -> bool:
    """Whether faces larger than their crops are filtered, see `faces.alignment.align_face`."""
    return _option("filter_crops", False) is True


def detector() -> str | None:
    """The face detector's name, or None for the best one there is."""
    value = _option("detector", AUTOMATIC_DETECTOR)
    return value if isinstance(value, str) and value in DETECTORS[1:] else None


def saves_maps() -> bool:
    """Whether routing maps are saved beside the pictures."""
    return _option("save_maps", False) is True
