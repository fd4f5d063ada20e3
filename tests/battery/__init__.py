"""Small functions that use their kernels in every way people write, as plain data: `CASES`, by name."""

from battery import arguments, consumers, control, convolutions, layouts

PARTS = (layouts, consumers, convolutions, control, arguments)
CASES = {name: case for part in PARTS for name, case in part.CASES.items()}
assert len(CASES) == sum(len(part.CASES) for part in PARTS)
