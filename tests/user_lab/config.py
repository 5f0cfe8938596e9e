"""The config file of the user."""

from ml_collections import ConfigDict

from configs import smoke


def get_config():
    config = smoke.get_config()
    config.name = "bars"
    config.data.name = "user_lab.data:bars"
    config.model = ConfigDict(dict(name="user_lab.networks:Convolutional", image_size=8, image_channels=1, width=8))
    config.schedule.name = "user_lab.schedules:power"
    config.sample.sampler = "user_lab.samplers:Churn"
    config.sample.tau = "user_lab.samplers:cubic"
    config.evaluate.update(features="user_lab.evaluation:pixel_rows", num_images=32, batch_size=16)
    config.evaluate.metrics = "fid,user_lab.evaluation:mean_distance"
    config.train.optimizer.name = "user_lab.training:chain"
    config.train.objective.name = "user_lab.training:huber"
    config.train.objective.time = "user_lab.training:late"
    config.train.ema_schedule = "user_lab.training:halving"
    return config
