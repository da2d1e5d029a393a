"""How the tests start a command in two processes; `accelerate launch` starts one, whatever is asked, without a GPU."""

import sys

TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
