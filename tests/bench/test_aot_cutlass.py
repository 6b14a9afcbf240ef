"""benchmarks/aot_cutlass.py counts what a warp issues, and says so where it cannot compile."""

from __future__ import annotations

import aot_cutlass
import pytest


def test_it_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_cutlass, "find_spec", lambda name: None if name == "quack" else object())
    assert aot_cutlass.main([]) == 0
    assert capsys.readouterr().out == "skipped: not installed: quack; pip install quack-kernels triton brings all\n"


def numbered(*instructions: str) -> list[tuple[int, str]]:
    return [(16 * place, instruction) for place, instruction in enumerate(instructions)]


HGMMA = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24"  # 32 of them are 16,384 values of 512 products


def test_a_loop_within_the_loop_over_tiles_counts_as_often_as_it_runs() -> None:
    loader = ("UTMALDG.3D [UR8]", "BRA 0x0")
    tile = (
        "BAR.SYNC 0x1",
        HGMMA,
        HGMMA,
        *("ISETP P0", HGMMA, "NOP", HGMMA, "BRA 0x50"),
        "FADD R1",
        "MOV R2",
        "BRA 0x20",
    )
    issued, epilogue = aot_cutlass.issued_by_warp(numbered(*loader, *tile, "EXIT", "BRA 0x90"))
    assert issued == 3 + 15 * 4 + 3  # without NOP
    assert epilogue == ["BRA", "FADD", "MOV", "BRA"]


def test_a_loop_alone_counts_as_often_as_it_runs() -> None:
    code = numbered("S2R R0", HGMMA, HGMMA, "BRA P0, 0x10", "FADD R1", "EXIT", "MOV R2", "BRA 0x60")
    assert aot_cutlass.issued_by_warp(code) == (1 + 16 * 3 + 2, ["BRA", "FADD", "EXIT"])


def test_code_without_loops_counts_once() -> None:
    assert aot_cutlass.issued_by_warp(numbered("S2R R0", *[HGMMA] * 32, "EXIT")) == (34, ["EXIT"])
