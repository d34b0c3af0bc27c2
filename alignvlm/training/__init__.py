"""Training: a run takes its stages, a stage its steps. Everything that is not the step is a callback."""

from importlib.util import find_spec

from alignvlm.errors import UserError

for _name in ("accelerate", "deepspeed"):
    if find_spec(_name) is None:
        raise UserError(f"this needs the packages of training, {_name} among them: pip install 'alignvlm[train]'")
