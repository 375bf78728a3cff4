"""The page of `rlaif report`: what run folders hold, in one HTML file that needs no network."""
