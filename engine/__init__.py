"""Models, the queue, and the engines that compute. Knows neither HTTP nor text."""
