"""Early exit: tokens leave at the first exit that is sure of them, and the layers above catch up later."""
