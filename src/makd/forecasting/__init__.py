"""Before the flow begins: what a run will make, and what memory, disk and time it will take.

config of the teacher, text, settings -> shapes -> counted operations and bytes -> a machine's speed -> seconds
"""

from makd.forecasting.fit import check_fits
from makd.forecasting.outcome import RunForecast, forecast_table
from makd.forecasting.run import check_run, check_stream, check_weights, forecast
from makd.forecasting.student import Forecast, forecast_factorization

__all__ = [
    "Forecast",
    "RunForecast",
    "check_fits",
    "check_run",
    "check_stream",
    "check_weights",
    "forecast",
    "forecast_factorization",
    "forecast_table",
]
