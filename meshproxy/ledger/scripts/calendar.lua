-- Sets day and month: the UTC date of now_ms as '2026-11-24' and '2026-11'. Scripts can't call os.date. The arithmetic
-- is Howard Hinnant's civil_from_days ("chrono-Compatible Low-Level Date Algorithms"): years begin on 1 March, in eras
-- of 400 years. Needs clock.
local function civil(days)
  local shifted = days + 719468
  local era = math.floor(shifted / 146097)
  local day_of_era = shifted - era * 146097
  local year_of_era = math.floor(
    (day_of_era - math.floor(day_of_era / 1460) + math.floor(day_of_era / 36524) - math.floor(day_of_era / 146096)) / 365
  )
  local leap_days = math.floor(year_of_era / 4) - math.floor(year_of_era / 100)
  local day_of_year = day_of_era - (365 * year_of_era + leap_days)
  local from_march = math.floor((5 * day_of_year + 2) / 153)
  local day = day_of_year - math.floor((153 * from_march + 2) / 5) + 1
  local month = from_march < 10 and from_march + 3 or from_march - 9
  local year = year_of_era + era * 400 + (month <= 2 and 1 or 0)
  return year, month, day
end

local year, month_of_year, day_of_month = civil(math.floor(now_ms / 86400000))
local month = string.format('%04d-%02d', year, month_of_year)
local day = string.format('%s-%02d', month, day_of_month)
