"""Run networks: the stages, their measurement, and what drives them."""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m train.pretrain`, or `deepspeed --module train.pretrain`
    from selmask import leave_working_folder

    leave_working_folder()
