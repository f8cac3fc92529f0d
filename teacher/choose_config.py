"""Configuration of ``vpr teacher choose``. Imports no heavy library."""

from dataclasses import dataclass

from vpr.artifacts.paths import check_file
from vpr.common.errors import UserError, check_numbers


@dataclass(frozen=True)
class ChooseConfig:
    """Comparison of untrained towers.

    Attributes:
        towers: Towers as ``NAME:WEIGHTS``. WEIGHTS is a tag or a ``.safetensors`` file; empty draws random weights.
            ``timm/NAME.TAG`` alone takes the weights of its tag, and the path of a teacher artifact those of the
            teacher.
        catalog: Catalogue artifact; the queries of its ``validation`` split are scored.
        output: CSV file for the table; empty only prints the table.
        batch_size: Images per batch.
        threads: Background threads that decode images; 0 decodes between the batches.
        seed: Seed of random weights, equal to the seed of ``vpr teacher train``.
    """

    towers: tuple[str, ...]
    catalog: str
    output: str = ""
    batch_size: int = 64
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.towers:
            raise UserError("towers: expected one or more, got none. Pass --towers NAME:WEIGHTS.")
        check_numbers(self, batch_size=(1, 1 << 20), threads=(0, 64), seed=(0, (1 << 31) - 1))
        check_file("output", self.output)
