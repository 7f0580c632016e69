"""GPUs: their memory, and how fast they compute and read it, from the data sheets.

Times are calibrated on an H200 and an H100. For other cards the same shares of their data sheets are assumed: an
estimate. Standard library only.
"""

import re
from dataclasses import dataclass

from common.errors import InputError, did_you_mean

USABLE = 0.97  # the share of a card's memory that a process can have: the driver keeps the rest
SIZES = (8, 12, 16, 24, 40, 48, 80, 141)  # GB, the cards of `make plan`


@dataclass(frozen=True)
class Device:
    """A card. `gib` is what a process can have, the CUDA context included."""

    name: str
    gib: float
    tflops: float  # dense, in bfloat16 (Turing: float16), with accumulation in 32 bit
    bandwidth: float  # GB/s
    fp8: bool = False  # from capability 8.9 on
    measured: bool = False
    link: float = 25.0  # GB/s to another card of the host, one way: NVLink, else 16 lanes of PCIe 4


def _card(
    name: str,
    gib: float,
    tflops: float,
    bandwidth: float,
    fp8: bool = False,
    measured: bool = False,
    link: float = 25.0,
) -> Device:
    return Device(name, gib * USABLE, tflops, bandwidth, fp8, measured, link)


# Speeds are those of NVIDIA's data sheets; memory is what nvidia-smi shows in GiB: with the ECC of GDDR6 it is less.
DEVICES = {
    device.name: device
    for device in (
        _card("rtx3060", 12, 51, 360),
        _card("rtx3090", 24, 71, 936),
        _card("rtx4060ti", 16, 88, 288, fp8=True),
        _card("rtx4090", 24, 165, 1008, fp8=True),
        _card("rtx5090", 32, 210, 1792, fp8=True),
        _card("t4", 15, 65, 320),
        _card("l4", 22.5, 121, 300, fp8=True),
        _card("a10", 22.5, 125, 600),
        _card("a40", 45, 150, 696),
        _card("l40s", 45, 362, 864, fp8=True),
        _card("a100-40", 40, 312, 1555, link=300),
        _card("a100", 80, 312, 2039, link=300),
        _card("h100", 80, 989, 3350, fp8=True, measured=True, link=450),
        _card("h200", 140, 989, 4800, fp8=True, measured=True, link=450),
        _card("b200", 180, 2250, 8000, fp8=True, link=900),
    )
}
# The cards that people have of each size: what `make plan` counts time on.
TYPICAL = {8: None, 12: "rtx3060", 16: "t4", 24: "rtx4090", 40: "a100-40", 48: "l40s", 80: "h100", 141: "h200"}


def find_device(name: str) -> Device:
    """A card by its name, such as h100 or rtx4090, or by its memory, such as 24GB. Raises InputError.

    A card of a size that no known card has is that memory with the speed of the nearest smaller one.
    """
    plain = re.sub(r"[^a-z0-9.-]", "", name.lower())
    if plain in DEVICES:
        return DEVICES[plain]
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)(?:gi?b?)?", plain):
        return of_size(float(found[1]))
    if named := by_driver_name(name):
        return named
    raise InputError(
        f"--card {name}: no such card{did_you_mean(plain, DEVICES)}; give its memory, as 24GB, or one of "
        f"{', '.join(DEVICES)}"
    )


def of_size(gb: float) -> Device:
    """The typical card of so many GB."""
    if not gb > 0:
        raise InputError(f"--card {gb:g}GB: expected more than 0")
    size = max((size for size in SIZES if size <= gb), default=SIZES[0])
    like = DEVICES[TYPICAL[size] or "rtx3060"]
    if gb in TYPICAL and TYPICAL[size]:
        return like
    return Device(f"{gb:g}GB", gb * USABLE, like.tflops, like.bandwidth, like.fp8, link=like.link)


def by_driver_name(name: str) -> Device | None:
    """The card that nvidia-smi and torch call `name`, such as "NVIDIA GeForce RTX 4090"; None where it is not known."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(rtx) (\d{4}) ?(ti)?", r"\1\2\3", name.lower()))
    if "a100" in words and "40gb" in words:
        return DEVICES["a100-40"]
    return next((DEVICES[word] for word in words if word in DEVICES), None)
