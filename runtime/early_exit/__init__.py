"""Early exit: a token leaves at the first exit that is sure of it, and the layers above catch up later."""
