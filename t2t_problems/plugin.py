"""Everything that the plugin registers with Tensor2Tensor."""

# isort: off
from absl import flags

from t2t_problems import tensorflow_two

tensorflow_two.behave_as_one()

from t2t_problems import autograph, budgeted, enfr, hparams, optimizers, pairs  # noqa: E402, F401
from t2t_problems.failure import user_errors_end_the_process  # noqa: E402

tensorflow_two.mend_warm_starts()
tensorflow_two.mend_waiting_for_checkpoints()
autograph.leave_models_alone()

# Tensor2Tensor's programs load the plugin when their flags are read and before they are used.
if flags.FLAGS.is_parsed() and "hparams_set" in flags.FLAGS:
    with user_errors_end_the_process():
        hparams.check_name(flags.FLAGS["hparams_set"].value or "")
        hparams.check_seconds(flags.FLAGS["hparams"].value or "")
