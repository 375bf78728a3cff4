"""rlaif_ray: reinforcement learning from AI feedback at cluster scale, on Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
