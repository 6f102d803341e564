"""Post-training ternary without gradients: the solvers (`ptq.quantizers`) and what runs them over a model (`ptq.model`)."""
