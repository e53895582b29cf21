"""`mmattn doctor`."""

from __future__ import annotations


def doctor() -> None:
    """Print what this machine has and what is wrong with it.

    Versions, devices, attention backends, and combinations of them with known faults.
    """
    import mmattn
    from mmattn.cli import environment

    print("Versions:")
    for name, version in environment.versions():
        print(f"  {name:<14}{version}")
    print("Devices:")
    for line in environment.devices():
        print(f"  {line}")
    print("Attention backends:")
    for line in str(mmattn.backends()).splitlines():
        print(f"  {line}")
    print("Known problems:")
    for line in environment.known_problems() or ["none with these versions"]:
        print(f"  {line}")
