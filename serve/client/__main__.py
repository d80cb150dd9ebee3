"""The client on the command line: `python -m serve.client verify a.png b.png --far 0.01`."""

import argparse
import sys
import traceback
from collections.abc import Sequence

from serve.client.answers import OperatingPoint, Verification
from serve.client.client import KEY, URL, Client
from serve.client.errors import ServiceError
from serve.client.retries import Retries

MATCH, NO_MATCH, ERROR = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 (of verify: match), 1 (no match) or 2 (error)."""
    options = _parser().parse_args(argv)
    try:
        with Client(options.url, retries=Retries(deadline=options.deadline)) as client:
            status: int = options.run(client, options)
            return status
    except ServiceError as error:
        return _failed(f"{error.message}{f' ({error.code})' if error.code else ''}")
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (TypeError, ValueError) as error:
        return _failed(str(error))
    except Exception:  # Python's own status for it would mean no match
        traceback.print_exc()
        return ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.client",
        description=f"Asks a running service. An API key is taken from the environment variable {KEY}.",
        epilog="Exit status: 0, of verify a match; 1 no match; 2 an error.",
    )
    parser.add_argument("--url", default=URL, help="of the service (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=30.0, help="seconds, with all tries (default: %(default)g)")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    verify = commands.add_parser("verify", help="are two images the same?")
    verify.add_argument("a", help="image file")
    verify.add_argument("b", help="image file")
    _add_decision(verify)
    verify.set_defaults(run=_verify)

    embed = commands.add_parser("embed", help="embeddings of images")
    embed.add_argument("images", nargs="+", help="image files")
    embed.add_argument("--out", help="a .npy file for them, float32 (B, D); else a line of numbers for each image")
    embed.set_defaults(run=_embed)

    search = commands.add_parser("search", help="the nearest items of a gallery")
    search.add_argument("gallery")
    search.add_argument("query", help="image file")
    search.add_argument("-k", type=int, default=10, help="how many (default: %(default)s)")
    _add_decision(search)
    search.set_defaults(run=_search)

    commands.add_parser("models", help="what is served").set_defaults(run=_models)
    return parser


def _add_decision(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--far", type=float, help="false accept rate of a calibrated operating point, e.g. 0.01")
    group.add_argument("--threshold", type=float, help="Euclidean distance, 0 to 2")


def _verify(client: Client, options: argparse.Namespace) -> int:
    found = client.verify(options.a, options.b, far=options.far, threshold=options.threshold)
    side = "<=" if found.match else ">"
    print("match" if found.match else "no match")
    print(f"  distance   {found.distance:.4f} {side} {found.threshold:.4f}  (cosine similarity {found.similarity:.4f})")
    print(f"  threshold  {_origin(found)}")
    print(f"  model      {found.model}")
    return MATCH if found.match else NO_MATCH


def _origin(found: Verification) -> str:
    point = found.operating_point
    if point is None:
        return "as given"
    rates = f"FAR {_rate(point.far, point.far_interval)}, FRR {_rate(point.frr, point.frr_interval)}"
    return f"set for FAR {point.far_target:g} by calibration {found.calibration}: {rates}"


def _embed(client: Client, options: argparse.Namespace) -> int:
    import numpy as np

    embeddings_BD = client.embeddings(options.images)
    if options.out:
        with open(options.out, "wb") as file:
            np.save(file, embeddings_BD)
        print(f"{options.out}: {len(embeddings_BD)} embeddings of {embeddings_BD.shape[1]} dimensions")
        return 0
    for image, row_D in zip(options.images, embeddings_BD, strict=True):
        print(image, *(f"{value:.6g}" for value in row_D))
    return 0


def _search(client: Client, options: argparse.Namespace) -> int:
    found = client.search(options.gallery, options.query, options.k, far=options.far, threshold=options.threshold)
    for hit in found.data:
        word = {True: "match", False: "", None: ""}[hit.match]
        extra = "  ".join(f"{name}={value}" for name, value in hit.metadata.items())
        print(f"{hit.distance:8.4f}  {word:5}  {hit.id}  {extra}".rstrip())
    decided = "" if found.threshold is None else f", threshold {found.threshold:.4f}"
    print(f"{len(found.data)} of gallery {found.gallery}{decided}, {found.model}")
    return 0


def _models(client: Client, _: argparse.Namespace) -> int:
    models = client.models()
    for model in models:
        alias = f" ({model.alias})" if model.alias else ""
        print(f"{model.id}@{model.version}{alias}: {model.dim} dimensions, {model.image_size} px")
        for point in model.operating_points:
            print(f"  {_shown(point)}")
    if not models:
        print("no model is served yet")
    return 0


def _shown(point: OperatingPoint) -> str:
    far, frr = _rate(point.far, point.far_interval), _rate(point.frr, point.frr_interval)
    return f"far {point.far_target:g}: threshold {point.threshold:.4f}, FAR {far}, FRR {frr}"


def _rate(rate: float, interval: tuple[float, float] | None) -> str:
    return f"{rate:.3g}" if interval is None else f"{rate:.3g} ({interval[0]:.2g} to {interval[1]:.2g})"


def _failed(what: str) -> int:
    print(f"error: {what}", file=sys.stderr)
    return ERROR


if __name__ == "__main__":
    raise SystemExit(main())
