"""Evaluate: identity, prompt and quality by the papers' protocols, with errors.

portrait.py evaluate single --output RESULTS              one person, beside the text-only base and real pictures
portrait.py evaluate multi --output RESULTS               all pairs of people
portrait.py evaluate single --reference-guidance --output RESULTS   each adapter without and with RB-Guidance
portrait.py evaluate guidance --output RESULTS            its settings swept, one after the other, as plots
portrait.py evaluate groups --output RESULTS              2 to 7 people in a picture
portrait.py evaluate all --output RESULTS                 every protocol, and a page that gathers them
portrait.py evaluate references beta --output RESULTS     1, 2, 4 photos of a person; the face structure scale

Tables are written as RESULTS/PROTOCOL.md and .json, the measurements of each picture as .jsonl, some pictures as .png.
Broken off, the same command goes on: pictures are kept and never generated twice with the same settings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

REQUIREMENTS = "train"
PROTOCOLS = ("single", "multi", "groups", "references", "beta", "guidance")
ALL = "all"


def configure(parser: argparse.ArgumentParser) -> None:
    known = (*PROTOCOLS, ALL)
    parser.add_argument("protocols", nargs="+", choices=known, metavar="PROTOCOL", help=", ".join(known))
    parser.add_argument("--output", type=Path, required=True, metavar="RESULTS", help="folder for everything")
    made = parser.add_argument_group("what makes the pictures")
    made.add_argument("--checkpoint", type=Path, metavar="FILE", help="any SD 1.5 single file; default: the world's")
    made.add_argument("--kit", type=Path, metavar="FOLDER", help="another world's kit, with what measures its people")
    made.add_argument(
        "--adapter",
        action="append",
        metavar="[LABEL=]PLACE",
        help="a name in the model folders, or a folder that holds one adapter; repeated, a row of the table each",
    )
    made.add_argument("--size", type=int, help="side in pixels; default: the checkpoint's")
    made.add_argument("--steps", type=int, help="default 20")
    made.add_argument("--guidance", type=float, help="default 5")
    made.add_argument("--sampler", help="default ddim")
    made.add_argument("--negative-prompt", metavar="TEXT")
    made.add_argument("--scale", type=float, help="ID scale, default 0.7")
    made.add_argument("--structure", type=float, help="face structure scale β, default 0.1")
    made.add_argument(
        "--option", action="append", metavar="NAME=VALUE", help="of the adapter's method; repeated for several"
    )
    made.add_argument(
        "--reference-guidance",
        nargs="?",
        const="",
        metavar="NAME=VALUE,…|JSON",
        help="single, multi, groups: each row with people also with RB-Guidance, and one with nothing else; "
        "what is not given is as the adapter's kit says",
    )
    made.add_argument(
        "--sweep",
        dest="sweeps",
        action="append",
        metavar="NAME=VALUE,VALUE,…",
        help="guidance: an option of it and its values; repeated, one after the other; default: begin, strength and "
        "reference_t",
    )
    made.add_argument("--batch", type=int, help="pictures at once, default 8")
    made.add_argument("--device", help="default: cuda where there is one, else cpu")
    made.add_argument("--processes", type=int, help="that generate at once; default: a core each for the world, else 1")
    whom = parser.add_argument_group("whom and how many")
    whom.add_argument("--people", metavar="held-out|train|FOLDER", help="of the world, or photos; default held-out")
    whom.add_argument("--number", type=int, help="of people; default: see below")
    whom.add_argument("--prompts", type=int, help="for each person, pair or group, of 40 or, for several people, 21")
    whom.add_argument("--pictures", type=int, help="for each prompt")
    whom.add_argument("--gallery", type=int, help="people of the world in the gallery, at least; default 100")
    whom.add_argument("--references", type=int, nargs="+", metavar="N", help="numbers of photos, default 1 2 4")
    whom.add_argument(
        "--people-per-picture", type=int, nargs="+", metavar="N", help="groups: sizes, default 2 3 4 5 6 7"
    )
    whom.add_argument(
        "--sides", action="store_true", help="multi, groups: also with a region for each person, side by side"
    )
    whom.add_argument("--layouts", action="store_true", help="multi, groups: also with a place for each face")
    whom.add_argument(
        "--names-each",
        action="store_true",
        help='prompts say "a woman and a woman", not "two women", as where the method of an --adapter needs it',
    )
    whom.add_argument("--betas", type=float, nargs="+", metavar="β", help="default 0 0.1 0.3 0.6 1")
    parser.epilog = (
        "People x prompts x pictures: for photos 15 x 40 x 4 and 15 x 21 x 4 (pairs) as in the paper; for the world "
        "100 x 5 x 1 (single, references), 15 x 4 x 1 (multi), 60 x 2 x 1 (groups), 50 x 5 x 1 (beta), "
        "50 x 3 x 1 (guidance)."
    )
    by = parser.add_argument_group("what measures them; for people of the world its own by default")
    by.add_argument("--detector", metavar="mtcnn|insightface|FILE", help="finds faces")
    by.add_argument("--recogniser", metavar="FILE", help="FaceNet or an IR network, never the one that conditions")
    by.add_argument("--clip", metavar="NAME:FILE", help="open_clip's name of a model and its weights")
    by.add_argument("--attributes", metavar="FILE", help="predicts the world's attributes; '' for none")
    by.add_argument("--fid", choices=("clip", "face"), help="whose features FID compares, default clip")


def run(options: argparse.Namespace) -> int:
    import dataclasses

    from trainer.evaluation.guided import guidance_options, swept
    from trainer.evaluation.page import evaluate_all
    from trainer.evaluation.plans import ProtocolSettings
    from trainer.evaluation.run import EvaluationSettings, evaluate, of_kit
    from trainer.frozen import default_device

    given = {name: value for name, value in vars(options).items() if value is not None}
    given |= {"adapters": given.pop("adapter", None), "options": given.pop("option", None)}
    if options.reference_guidance is not None:
        given["reference_guidance"] = guidance_options(options.reference_guidance)
    if options.sweeps is not None:
        given["sweeps"] = [swept(text) for text in options.sweeps]
    given |= {"device": options.device or default_device()}
    if options.kit is not None:
        given = {**of_kit(options.kit), **{name: value for name, value in given.items() if value is not None}}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    def part(form: type) -> dict[str, object]:
        names = [field.name for field in dataclasses.fields(form)]
        return {name: values[name] for name in names if values.get(name) is not None}

    protocols = ProtocolSettings(**part(ProtocolSettings))  # type: ignore[arg-type]
    settings = EvaluationSettings(**{**part(EvaluationSettings), "protocol_settings": protocols})  # type: ignore[arg-type]
    (evaluate_all if ALL in settings.protocols else evaluate)(settings)
    return 0
