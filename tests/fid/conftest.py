# SPDX-License-Identifier: Apache-2.0
import pytest

pytest.register_assert_rewrite("digits_world")

from digits_world import _one_thread, extractors, world  # noqa: E402

__all__ = ["_one_thread", "extractors", "world"]
