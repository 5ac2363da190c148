"""The option of a tiny VAE for pictures that only become references, and where it has something to do."""

import argparse

from storyadapter.method.errors import InputError
from storyadapter.method.plan import RunPlan


def add_reference_vae_option(parser: argparse.ArgumentParser) -> None:
    """Of the model that is built, or drawn with."""
    parser.add_argument(
        "--reference-vae",
        metavar="P",
        help="a tiny VAE of SDXL (diffusers' AutoencoderTiny, such as TAESDXL) that decodes every iteration but the "
        "last, whose pictures only become references: a diffusers folder or a file; run needs --keep last with it",
    )


def check_reference_vae(args: argparse.Namespace, plan: RunPlan) -> None:
    """Raises InputError: one was given, and all that it would decode is to be kept, or there is nothing."""
    if args.reference_vae and args.keep != "last":
        raise InputError("--reference-vae is given, which decodes what isn't kept", expected="--keep last with it")
    if args.reference_vae and plan.iterations == 1:
        raise InputError("--reference-vae is given, and no iteration follows the first", advice="leave it out")
