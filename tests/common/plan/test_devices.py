"""Cards by their names and sizes."""

import pytest
from common.errors import InputError
from common.plan.devices import DEVICES, by_driver_name, find_device, of_size


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx4060ti"),
    ],
)
def test_the_drivers_names_are_known(name, card):
    assert by_driver_name(name) is DEVICES[card]
    assert find_device(name) is DEVICES[card]


def test_a_card_may_be_its_memory():
    assert find_device("24GB") is find_device("24") is find_device("rtx4090")
    assert of_size(20).gib < of_size(24).gib
    assert by_driver_name("Radeon") is None
    with pytest.raises(InputError, match=r"h10: no such card \(did you mean h100\?\)"):
        find_device("h10")
    with pytest.raises(InputError, match="more than 0"):
        find_device("0GB")


def test_less_memory_is_left_than_the_name_says():
    assert all(0.9 < device.gib / float(size) < 1 for size, device in ((80, DEVICES["h100"]), (141, DEVICES["h200"])))
