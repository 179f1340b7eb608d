"""Options of the classes of vector-quantize-pytorch that have a codebook.

VectorQuantize, ResidualVQ, GroupedResidualVQ, RandomProjectionQuantizer, SimVQ, ResidualSimVQ, HierarchicalVQ, Sequential.
"""

from vqp_case import Case

CASES: list[Case] = []

# Why an option is missing in genperf, by class and option; a class that is missing has the option "".
UNSUPPORTED: dict[tuple[str, str], str] = {}

# How an option differs from upstream's; with the option "", the class.
DIFFERS: dict[tuple[str, str], str] = {}

# Options that are supported without a kernel; with the option "", the class.
PLAIN: dict[tuple[str, str], str] = {}

# Why an attribute or method of a layer is missing, by class and name.
WITHOUT: dict[tuple[str, str], str] = {}
