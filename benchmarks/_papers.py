"""What others have published: figures of the five papers, their authors' files and code, and Torch-Pruning, for `tables`."""

from typing import NamedTuple


class Hinge(NamedTuple):
    """A row of the paper's tables; errors are of top-1, all in percent."""

    table: int
    network: str
    dataset: str
    error: float
    whole: float | None  # error of the network it came from; None where it is not printed
    flops: float
    params: float | None


# Li et al., CVPR 2020, tables 1 (CIFAR-10), 2 (CIFAR-100) and 4 (ImageNet).
HINGE = [
    Hinge(1, "ResNet-56", "CIFAR-10", 6.31, 7.05, 50.00, 48.73),
    Hinge(1, "ResNet-56", "CIFAR-10", 7.35, 7.05, 24.00, 20.80),
    Hinge(1, "ResNet-20", "CIFAR-10", 8.16, 7.46, 45.50, 44.55),
    Hinge(1, "ResNet-164", "CIFAR-10", 5.40, 4.97, 53.61, 70.34),
    Hinge(1, "ResNeXt-20", "CIFAR-10", 8.04, 7.46, 59.00, 63.95),
    Hinge(1, "ResNeXt-164", "CIFAR-10", 5.13, 4.82, 44.42, 50.53),
    Hinge(1, "VGG-16", "CIFAR-10", 6.41, 5.98, 60.93, 19.95),
    Hinge(1, "DenseNet-12-40", "CIFAR-10", 5.33, 5.26, 55.60, 72.46),
    Hinge(2, "WRN-16-10", "CIFAR-100", 21.79, 21.58, 75.61, 83.29),
    Hinge(2, "WRN-16-10, no annealing", "CIFAR-100", 23.61, 21.58, 75.59, 84.31),
    Hinge(2, "WRN-16-10", "CIFAR-100", 22.06, 21.58, 57.39, 67.80),
    Hinge(2, "WRN-16-10, no annealing", "CIFAR-100", 23.13, 21.58, 57.41, 68.72),
    Hinge(2, "ResNet-20", "CIFAR-100", 33.66, 31.17, 32.94, 33.64),
    Hinge(2, "ResNet-164", "CIFAR-100", 23.12, 23.22, 55.32, 76.57),
    Hinge(2, "ResNeXt-20", "CIFAR-100", 28.74, 28.05, 53.59, 65.24),
    Hinge(2, "ResNeXt-164", "CIFAR-100", 22.56, 23.13, 47.75, 58.49),
    Hinge(4, "ResNet-50", "ImageNet", 25.30, None, 46.55, None),
]

# FLOPs and parameters that the authors' code counts in the networks that it starts from, WRN on CIFAR-100.
HINGE_WHOLE = {
    "resnet20": ("ResNet-20", 41_116_288, 269_738),
    "resnet56": ("ResNet-56", 127_083_136, 853_034),
    "resnet164": ("ResNet-164", 257_325_568, 1_704_154),
    "vgg16_linear3": ("VGG-16", 314_555_392, 15_253_578),
    "densenet12_40": ("DenseNet-12-40", 290_105_808, 1_059_298),
    "resnext20": ("ResNeXt-20", 36_817_408, 211_850),
    "resnext164": ("ResNeXt-164", 259_639_808, 1_713_546),
    "wrn16_10": ("WRN-16-10", 3_123_083_776, 17_179_940),
}

# Torch-Pruning's README: ResNet-56 on CIFAR-10, from 93.53 %: accuracy by way and how many times fewer MACs.
TORCH_PRUNING_WHOLE = 93.53
TORCH_PRUNING = {
    "group norm, sparse learning": ((93.77, 2.13), (93.64, 2.57)),
    "group norm": ((93.46, 2.13),),
    "L1 norm": ((92.93, 2.13),),
}


class Rate(NamedTuple):
    """What a paper keeps, and what that costs."""

    method: str
    ratio: float
    of: str
    change: str  # of accuracy, in points


# By contender of `finetune`: hinge of ResNet-20's FLOPs (table 1); fcf of the same without a quarter of the filters; linearconv
# of ResNet-18's parameters, at rank 10; csg of ResNet-20's, by slices of 12 x 12 and codes of 72; hetconv of VGG-16's FLOPs.
RATES = {
    "auto": Rate("hinge", 0.455, "MACs", "-0.70 (ResNet-20, table 1)"),
    "fcf": Rate("fcf", 0.584, "MACs", "not found"),
    "linearconv": Rate("linearconv", 0.505, "parameters", "-1.9 (ResNet-18, rank 10)"),
    "csg": Rate("csg", 0.43, "parameters", "-1.06 (ResNet-56, 12 x 12, the authors' files)"),
    "hetconv": Rate("hetconv", 0.338, "MACs", "-0.13 (VGG-16, P = 4)"),
}

# FCF's README, ResNet-34 on a CPU, by rate, percent less: FLOPs and time of the model, then of the convolutions inside blocks.
FCF = {
    "0.15": (26.83, 10.90, 27.95, 16.13),
    "0.25": (41.37, 16.86, 43.10, 23.77),
    "0.35": (54.87, 31.06, 57.16, 41.12),
    "0.45": (66.05, 42.59, 68.80, 55.09),
}
FCF_LAYER = {26.04: (17.63, 13.42), 43.75: (34.71, 30.64), 57.75: (42.19, 40.88), 75.00: (65.70, 59.20)}  # standard, squeeze


class LinearConv(NamedTuple):
    """A row of the paper's classification table, CIFAR-10: plain, all coefficients, rank 10."""

    name: str
    params: tuple[float, float, float]  # millions
    flops: tuple[float, float, float]  # billions, the making of the kernels included
    accuracy: tuple[float, float, float]  # percent, then points


LINEARCONV = {
    "base": LinearConv("Base", (0.40, 0.23, 0.21), (0.017, 0.060, 0.025), (87.2, -0.1, -0.6)),
    "vgg11": LinearConv("VGG-11", (9.23, 4.92, 4.65), (0.171, 2.398, 0.350), (90.4, 0.0, -0.6)),
    "allconv": LinearConv("AllConv", (1.37, 0.74, 0.70), (0.315, 0.440, 0.344), (85.0, -0.9, -3.1)),
    "resnet18": LinearConv("ResNet-18", (11.17, 6.03, 5.64), (0.558, 3.074, 0.775), (91.9, -0.8, -1.9)),
    "resnext29_2x64d": LinearConv("ResNeXt-29", (9.13, 6.48, 4.71), (1.424, 5.089, 1.691), (92.9, 0.5, 0.8)),
    "mobilenet_v2": LinearConv("MobileNetV2", (2.30, 3.92, 1.35), (0.098, 16.398, 0.931), (93.1, -0.3, -1.7)),
}

# CSG's authors' classes, parameters: plain; from slices of 16 x 16 and codes of 128, from 12 x 12 and 72: all, without generator.
CSG = {
    "resnet20": ("ResNet-20", 269_722, (312_218, 17_306), (115_426, 22_114)),
    "resnet56": ("ResNet-56", 853_018, (347_162, 52_250), (160_450, 67_138)),
    "resnet110": ("ResNet-110", 1_727_962, (399_578, 104_666), (227_986, 134_674)),
    "densenet_bc40_36": ("DenseNet-BC-40-36", 1_542_682, (1_059_994, 765_082), (842_842, 749_530)),
    "densenet_bc40_48": ("DenseNet-BC-40-48", 2_733_130, (1_617_994, 1_323_082), (1_416_394, 1_323_082)),
}

# The authors' files, and the accuracy that each says it has on CIFAR-10.
CSG_FILES = {
    "csg-rn56_org.t7": ("ResNet-56", "plain", 93.43),
    "csg-rn56_1616-128.t7": ("ResNet-56", "16 x 16, 128", 92.96),
    "RN56_1212-72": ("ResNet-56", "12 x 12, 72", 92.37),
    "csg-rn20_1616-128.t7": ("ResNet-20", "16 x 16, 72", 91.64),
    "csg-dnbc4036-csg1212-72.t7": ("DenseNet-BC-40-36", "12 x 12, 72", 94.95),
    "DNBC4048-CSG-1212-72-FP16": ("DenseNet-BC-40-48", "12 x 12, 72, float16", 94.56),
    "SHUFFLENETV2_CSG": ("ShuffleNetV2 0.5x", "16 x 16, 16, of its last layer", 90.20),
}

# HetConv's table of VGG-16 on CIFAR-10, by P: FLOPs in millions, accuracy in percent.
HETCONV = {
    "1": (313.74, 94.06),
    "2": (175.23, 93.89),
    "4": (105.98, 93.93),
    "8": (71.35, 93.92),
    "16": (54.04, 93.96),
    "32": (45.38, 93.73),
    "64": (41.05, 93.42),
}
