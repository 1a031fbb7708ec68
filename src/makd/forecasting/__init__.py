"""Before the flow begins: what a run will make, and what memory, disk and time it will take.

config of the teacher, text, settings -> shapes -> counted operations and bytes -> a machine's speed -> seconds
"""

from makd.forecasting.fit import check_fits
from makd.forecasting.run import RunForecast, check_run, check_stream, check_weights, forecast
from makd.forecasting.student import Forecast, forecast_factorization
from makd.forecasting.table import forecast_table

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
