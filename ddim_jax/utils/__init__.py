"""What all parts of the package share: errors, files, images, devices, signals."""
