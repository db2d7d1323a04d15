"""Each mend is still needed: Tensor2Tensor under TensorFlow 2 without it is as it was."""

import inspect
import subprocess
import sys

import pytest
from tensor2tensor.utils import contrib, trainer_lib

from t2t_problems import tensorflow_two

if not tensorflow_two.is_two():
    pytest.skip("TensorFlow 1 needs none of it", allow_module_level=True)

tensorflow_two.behave_as_one()


def test_warm_starts_find_what_they_ask_for(monkeypatch):
    monkeypatch.setattr(contrib, "framework", inspect.unwrap(contrib.framework))
    for name in ("load_checkpoint", "get_trainable_variables"):
        assert not hasattr(contrib.framework(), name), "no longer needed: mend_warm_starts"
    tensorflow_two.mend_warm_starts()
    for name in ("load_checkpoint", "get_trainable_variables", "nest"):
        assert hasattr(contrib.framework(), name)


def test_checkpoints_are_waited_for(tmp_path):
    code = "from tensor2tensor.utils import contrib; contrib.training()"
    stock = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "contrib is unavailable" in stock.stderr, "no longer needed: mend_waiting_for_checkpoints"
    tensorflow_two.mend_waiting_for_checkpoints()
    (tmp_path / "model.ckpt-3.index").write_text("")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-3"\n')
    found = list(trainer_lib.next_checkpoint(str(tmp_path), timeout_mins=0))
    assert found == [str(tmp_path / "model.ckpt-3")]


@pytest.mark.parametrize("mended", [False, True])
def test_layers_are_those_of_tensorflow_1(mended):
    """Also where Tensor2Tensor has chosen before the plugin is there, as `t2t-trainer` has."""
    program = "from tensor2tensor.layers import common_layers; common_layers.layers()\n"
    if mended:
        program += "from t2t_problems import tensorflow_two; tensorflow_two.behave_as_one()\n"
    program += "print('layers', hasattr(common_layers.layers(), 'dense'))"  # Keras has Dense alone
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == f"layers {mended}", "no longer needed: behave_as_one"
