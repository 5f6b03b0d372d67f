"""What the panel says of weights and kits: which there are, what is missing, and what a kit's makers found to work."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

from lib_portrait.checkpoints import KitStatus, KnownWeight, Missing
from lib_portrait.checkpoints.store import AUTOMATIC
from lib_portrait.errors import PortraitError
from lib_portrait.guidance.options import OPTIONS
from lib_portrait.methods.declarations import declaration, declarations
from lib_portrait.options import Value
from lib_portrait.webui import adetailer, checkpoint, instances, messages, panel_values
from lib_portrait.webui.messages import message_html

DOWNLOAD_PERIOD = 0.5


def checkpoint_choices(method: str = panel_values.DEFAULT.name) -> list[str]:
    """The choices of the checkpoint control."""
    kits = instances.store().kits(method)
    return [AUTOMATIC] + [kit.name + ("" if kit.usable else panel_values.INCOMPLETE) for kit in kits]


def kept_choice(chosen: str, choices: Sequence[str], method: str) -> str:
    """What the checkpoint control shows of `chosen` when these are the choices, those of a method.

    One that was pasted and is not here stays, to be said and refused; one of another method was chosen for that.
    """
    bare = str(chosen).removesuffix(panel_values.INCOMPLETE)
    for choice in choices:
        if choice.removesuffix(panel_values.INCOMPLETE) == bare:
            return choice
    others = (kit.name for one in declarations() if one.name != method for kit in instances.store().kits(one.name))
    return AUTOMATIC if bare in others else bare


def _wanted(chosen: str, loaded: checkpoint.Loaded, method: str) -> tuple[str, KitStatus | None]:
    """The adapter of a method that a choice of the checkpoint control means with the loaded checkpoint: its name, and
    what is there of it. Raises PortraitError where there is none, and none is published."""
    name = str(chosen).removesuffix(panel_values.INCOMPLETE)
    if name == AUTOMATIC:
        name = loaded.automatic(method)
    return name, next((kit for kit in instances.store().kits(method) if kit.name == name), None)


def weights_html(chosen: str, loaded: checkpoint.Loaded, method: str = panel_values.DEFAULT.name) -> tuple[str, bool]:
    """What the loaded checkpoint lacks to draw people, or what is to be known of it (HTML, or ""); and whether a
    download would help.

    chosen: of the checkpoint control.
    """
    if not declaration(method).has_adapter:
        return _kit_html(loaded), False
    if loaded.family not in (checkpoint.SD15, None):
        text = (
            f"{declaration(method).title} needs a checkpoint of the SD1.5 family, and the loaded one is "
            f"{loaded.family}. Load another."
        )
        return message_html(text, "warning"), False
    try:
        name, kit = _wanted(chosen, loaded, method)
    except PortraitError as error:
        return message_html(error.detail), False
    if kit is None:
        return message_html(f"There is no adapter {name}. Choose another Checkpoint here.", "warning"), False
    if kit.problem is not None:
        return message_html(f"{kit.name}: {kit.problem}"), False
    loadable = any(gap.known for gap in kit.missing)
    how = (
        f"press <b>{panel_values.DOWNLOAD_NAME}</b>, or put them there by hand"
        if loadable
        else "put them there by hand"
    )
    if not kit.usable:
        return _missing_html(
            f"Weights are missing (adapter {escape(kit.name)}): {how}.", kit.missing, "warning"
        ), loadable
    if kit.missing:
        text = f"For several people in one picture a file is missing (adapter {escape(kit.name)}): {how}."
        return _missing_html(text, kit.missing, "info"), loadable
    return _kit_html(loaded), False


def _kit_html(loaded: checkpoint.Loaded) -> str:
    """What the kit of the loaded checkpoint was made for (HTML, or "")."""
    manifest = loaded.manifest()
    if manifest is None:
        return ""
    values = checkpoint.controls(manifest)
    text = (
        f"The checkpoint of the kit {escape(manifest.name)} is loaded. It was made for {values['width']} × "
        f"{values['height']} px with {escape(values['sampling'])}, {values['steps']} steps and CFG "
        f"{values['cfg_scale']}; larger pictures may show a person several times."
    )
    return message_html(text, "info")


def neighbours_html() -> str:
    """What is to be known of other extensions, before anything is drawn (HTML, or "")."""
    advice = adetailer.advice()
    return message_html(advice, "info") if advice else ""


def _missing_html(text: str, gaps: Sequence[Missing], kind: str) -> str:
    """A message (HTML) on missing files, with their names and folders folded away."""
    items = []
    for folder in dict.fromkeys(gap.folder for gap in gaps):
        files = ", ".join(gap.filename for gap in gaps if gap.folder == folder)
        items.append(f"<li>{escape(files)} (into {escape(str(folder))})</li>")
    which = f"<details><summary>Which files, and where they go</summary><ul>{''.join(items)}</ul></details>"
    return f'<div class="portrait-message portrait-{kind}" role="alert">{text}{which}</div>'


def kit_settings() -> list[Any]:
    """What the host's controls (`checkpoint.CONTROLS`) become: as the kit says that was made on the loaded checkpoint.

    Raises PortraitError where none was: another checkpoint has been loaded since the button was offered."""
    manifest = checkpoint.loaded().manifest()
    if manifest is None:
        raise PortraitError("checkpoint", "no kit tells settings for the loaded checkpoint", "Choose them yourself.")
    return [*checkpoint.controls(manifest).values()]


def kit_guidance(chosen: str, title: str) -> Mapping[str, Value]:
    """What of reference guidance was found to work with a choice of the checkpoint control, or on what is loaded.

    title: of the method.
    """
    method, loaded = panel_values.method_of([True, title]), checkpoint.loaded()
    manifest = None
    if method.has_adapter:
        try:
            name, _ = _wanted(chosen, loaded, method.name)
            manifest = instances.store().manifest(name, method.name)
        except PortraitError:
            pass  # `weights_html` says what is wrong with it.
    return instances.store().guidance(manifest, loaded.file)


def guidance_html(values: Mapping[str, Value]) -> str:
    """What a kit's makers found to work (HTML), or ""."""
    said = [option.said(values[option.name]) for option in OPTIONS if option.name in values]
    return message_html(f"For this checkpoint these were found to work: {', '.join(said)}.", "info") if said else ""


def download_missing(chosen: str, loaded: checkpoint.Loaded, method: str = panel_values.DEFAULT.name) -> Iterator[str]:
    """Downloads the published files that a choice of the checkpoint control lacks; messages (HTML) on how it goes, the
    last on how it ended.

    The first file that cannot be had ends it: what comes after usually has the same source.
    """
    try:
        _, kit = _wanted(chosen, loaded, method)
    except PortraitError as error:
        yield message_html(error.detail)
        return
    gaps = kit.missing if kit is not None else ()
    for gap in gaps:
        if gap.known is None:
            continue
        try:
            yield from _download(gap.known, gap.folder)
        except Exception as error:
            yield message_html(messages.said(error).detail)
            return
    unpublished = [gap.remedy() for gap in gaps if gap.known is None]
    yield (message_html(" ".join(unpublished)) if unpublished else message_html("All weights are there.", "info"))


def _download(known: KnownWeight, folder: Path) -> Iterator[str]:
    """Downloads one file in a thread of its own; messages on how far it is. Raises what `download` raises."""
    from lib_portrait.checkpoints.download import download

    reports: queue.Queue[tuple[int, int]] = queue.Queue()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(download, known, folder, lambda done, total: reports.put((done, total)))
        yield message_html(f"{known.filename}: connecting", "info")
        while not running.done():
            time.sleep(DOWNLOAD_PERIOD)
            latest = None
            while not reports.empty():
                latest = reports.get()
            if latest is not None:
                done, total = (part / 2**20 for part in latest)
                yield message_html(f"{known.filename}: {done:.0f} of {total:.0f} MiB", "info")
        running.result()
