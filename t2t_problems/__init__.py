"""What `t2t-trainer --t2t_usr_dir t2t_problems` loads: sizes, problems, optimizer and model for Tensor2Tensor.

Only Tensor2Tensor's own import registers anything; `python -m t2t_problems.bleu` needs neither it nor TensorFlow.
"""

import sys

if "tensor2tensor" in sys.modules:
    from t2t_problems import plugin  # noqa: F401
