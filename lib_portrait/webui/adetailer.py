"""The neighbour ADetailer (Bing-su/adetailer): it draws every face anew, with those scripts only that it is told of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules import scripts, shared

from lib_portrait.errors import Notice

# As ADetailer knows scripts: by the name of their file. This extension's is scripts/portrait.py.
SCRIPT = "portrait"
FILE = "!adetailer"
WITHOUT_THEM = f'it draws faces anew without their people: add "{SCRIPT}" to the script names in Settings > ADetailer'


def advice() -> str:
    """What the panel says where ADetailer is installed and not told of this extension, or ""."""
    there = any(Path(one.path).stem == FILE for one in scripts.scripts_data)
    return f"ADetailer: {WITHOUT_THEM}." if there and not _runs_portrait() else ""


def notices(p: Any) -> list[Notice]:
    """What to know where ADetailer is going to draw the faces of `p` anew without their people."""
    script = next((one for one in p.scripts.alwayson_scripts if Path(one.filename).stem == FILE), None)
    if script is None or getattr(p, "_ad_disabled", False) or _runs_portrait():
        return []
    if not script.is_ad_enabled(*p.script_args[script.args_from : script.args_to]):
        return []
    return [Notice("ADetailer", WITHOUT_THEM)]


def _runs_portrait() -> bool:
    if not getattr(shared.opts, "ad_only_selected_scripts", True):
        return True
    names = str(getattr(shared.opts, "ad_script_names", "") or "")
    return SCRIPT in (name.strip() for name in names.split(","))
