from . import strategies as strategies
from .checks import CheckReport as CheckReport
from .checks import check_reward as check_reward
