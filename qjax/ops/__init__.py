"""Operations on packed weights: the one seam between QTensors and kernels."""
