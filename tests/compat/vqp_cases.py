# SPDX-License-Identifier: Apache-2.0
"""Every class and option of vector-quantize-pytorch 1.32: how a layer with it is made and called, and what differs in genperf.

tests/compat/test_vqp_options.py trains each case beside upstream, and walks upstream's signatures, so that no option is left out.
docs/drop-ins.md prints the tables (tests/compat/drop_ins.py).
"""

import vqp_code_free_cases as code_free
import vqp_codebook_cases as codebook

CASES = [*codebook.CASES, *code_free.CASES]
UNSUPPORTED = {**codebook.UNSUPPORTED, **code_free.UNSUPPORTED}
DIFFERS = {**codebook.DIFFERS, **code_free.DIFFERS}
PLAIN = {**codebook.PLAIN, **code_free.PLAIN}
WITHOUT = {**codebook.WITHOUT, **code_free.WITHOUT}
