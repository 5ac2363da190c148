"""Packs a module with the kernel by AOTInductor, loads the package, prints its error at a few sets of shapes:
one with a text of one chunk compiled in, one for texts of up to three."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from storyadapter.engine.inductor.target import check_compilers
from storyadapter.kernels.grca.launch import grca_triton
from tests.kernels.grca_cases import Case, error, inputs, reference


class Layer(torch.nn.Module):
    """The operator and something after it."""

    def forward(
        self, q: Tensor, text_kv: Tensor, text_row: Tensor, ref_kv: Tensor, ref_row: Tensor, ref_length: Tensor
    ) -> Tensor:
        """[B, S, H, D]."""
        return grca_triton(q, text_kv, text_row, ref_kv, ref_row, ref_length) + 1


def main() -> None:
    """The first argument is where the packages go."""
    check_compilers(torch.device("cuda"))
    for chunks in (1, 3):
        case = Case(4, 512, 2, 64, 77 * chunks, 40, (4, 40))
        rows, banks = torch.export.Dim("B", min=2, max=64), torch.export.Dim("G", min=2, max=16)
        prompts, tokens = torch.export.Dim("P", min=2, max=65), torch.export.Dim("R", min=2, max=2048)
        queries = torch.export.Dim("S", min=16, max=8192)
        text = {2: torch.export.Dim("T", min=77, max=231)} if chunks > 1 else {}
        shapes = ({0: rows, 1: queries}, {0: prompts, **text}, {0: rows}, {0: banks, 2: tokens}, {0: rows}, {0: banks})
        arguments = tuple(tensor.clone() for tensor in inputs(case, torch.float16, "cuda"))
        program = torch.export.export(Layer(), arguments, dynamic_shapes=shapes)
        path = str(Path(sys.argv[1], f"{chunks}.pt2"))
        run = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=path))
        others = (Case(6, 130, 2, 64, 77, 13, (4, 13, 9), prompts=5), Case(2, 100, 2, 64, 154, 40, (4, 40)))
        for other in (case, *others[:chunks]):
            values = tuple(tensor.clone() for tensor in inputs(other, torch.float16, "cuda", seed=2))
            print(error(run(*values), reference(values) + 1))


if __name__ == "__main__":
    main()
