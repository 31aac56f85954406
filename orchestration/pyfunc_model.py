"""The code MLflow stores beside a logged diffusion model, so that `mlflow.pyfunc.load_model` gives back a sampler.

MLflow copies this file into the model and runs it wherever the model is loaded. It must therefore stand alone: no
import of this project, and torch and diffusers only once a model is really loaded.
"""

import functools

import mlflow
import numpy as np
import pandas as pd

SAMPLES_AT_ONCE = 256  # bounds the memory of a large request; the samples do not depend on the requests before it


class DiffusionSampler(mlflow.pyfunc.PythonModel):
    """Samples from a diffusers pipeline; the folder is the model's artifact `pipeline`.

    A model that tells several laws apart by class labels is asked for label 0, its main law.
    """

    def load_context(self, context):
        """Load the pipeline, onto a GPU where there is one."""
        import torch
        from diffusers import DiffusionPipeline

        self.pipeline = DiffusionPipeline.from_pretrained(
            context.artifacts["pipeline"], local_files_only=True, use_safetensors=True
        )
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        unet = self.pipeline.unet
        if unet.config.num_class_embeds:  # pipelines of this kind never hand a label on
            unet.forward = functools.partial(
                unet.forward, class_labels=torch.zeros(1, dtype=torch.long, device=unet.device)
            )

    def predict(self, context, model_input: pd.DataFrame = None, params=None):
        """Draw samples; the same parameters give the same samples.

        Args:
            model_input: ignored, these models need none; MLflow's interface asks for it (None will do);
                without a type for it MLflow prints advice on every load.
            params: `num_samples` (>= 1), `num_inference_steps` (1 to the steps trained with), `seed`.
        Returns: float32, shape (num_samples, channels, height, width), in [-1, 1].
        Raises: ValueError if a parameter is out of its range.
        """
        import torch

        params = params or {}
        trained_steps = self.pipeline.scheduler.config.num_train_timesteps
        count = int(params.get("num_samples", 16))
        steps = int(params.get("num_inference_steps", trained_steps))
        if count < 1:
            raise ValueError(f"num_samples is {count}; ask for at least 1 sample")
        if not 1 <= steps <= trained_steps:
            raise ValueError(
                f"num_inference_steps is {steps}; the model was trained with {trained_steps}, use 1 to that"
            )
        generator = torch.Generator().manual_seed(int(params.get("seed", 0)))
        parts = []
        while count > 0:
            images = self.pipeline(
                batch_size=min(count, SAMPLES_AT_ONCE),
                generator=generator,
                num_inference_steps=steps,
                output_type="np",
            ).images
            parts.append(images.transpose(0, 3, 1, 2) * 2 - 1)  # the pipeline gives (n, h, w, c) in [0, 1]
            count -= len(images)
        return np.concatenate(parts).astype(np.float32)


mlflow.models.set_model(DiffusionSampler())
