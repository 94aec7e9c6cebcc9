from schoenbat.attention import ATTENTIONS as ATTENTIONS
from schoenbat.calibration import calibrate as calibrate
from schoenbat.calibration import calibrate_tensors as calibrate_tensors
from schoenbat.diagnosis import PoorEstimateWarning as PoorEstimateWarning
from schoenbat.diagnosis import diagnose as diagnose
from schoenbat.diagnosis import diagnose_tensors as diagnose_tensors
from schoenbat.errors import UserError as UserError
from schoenbat.estimate import Estimate as Estimate
from schoenbat.fitting import fit_kernels as fit_kernels
from schoenbat.fitting import transfer as transfer
from schoenbat.functional import dot_product_kernel_attention as dot_product_kernel_attention
from schoenbat.kernels import KERNELS as KERNELS
from schoenbat.kernels import Kernel as Kernel
from schoenbat.lra.pretrained import PretrainedClassifier as PretrainedClassifier
from schoenbat.lra.tasks import TASKS as TASKS
from schoenbat.nn.mha import MultiheadKernelAttention as MultiheadKernelAttention
from schoenbat.replacement import replace as replace

__version__: str
