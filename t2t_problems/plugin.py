"""Everything that the plugin registers with Tensor2Tensor."""

# isort: off
from t2t_problems import tensorflow_two

tensorflow_two.behave_as_one()

from t2t_problems import budgeted, enfr, hparams, optimizers, pairs  # noqa: E402, F401
