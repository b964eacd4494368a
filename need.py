import torch, sys
from nnpatch_core import Sites, plan_sweep
from docs.examples import *
