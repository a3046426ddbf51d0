"""The networks: timm backbones behind a normalisation layer, their files and their predictor."""
