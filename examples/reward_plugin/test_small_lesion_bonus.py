"""The whole test of a reward: its claims hold on generated answers, valid, broken and hostile."""

import pytest
from segrl_reward_plugin import small_lesion_bonus

from segrl.testing import check_reward


@pytest.mark.parametrize("max_area", [0.01, 1.0])  # generated lesions are rarely small: 1.0 lets all of them count
def test_small_lesion_bonus(max_area):
    check_reward(small_lesion_bonus, max_area=max_area)
