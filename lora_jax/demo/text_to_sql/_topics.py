"""Tables by topic: `table: text columns | numbers | amounts of money | dates`. Every column name occurs once.

The task's training, validation and test topics and the pretraining topics have no table or column in common, so a test
question is about a table and columns that neither the base nor the adapter has seen.
"""

from lora_jax.demo.text_to_sql._query import KINDS, Column, Table

PRETRAINING = """
airlines: carrier hub_airport alliance | fleet_size daily_flights | ticket_price | licensed
albums: album_title singer record_label | track_count minutes_long | album_price | released
architects: architect_name studio style | buildings_designed | design_fee | graduated
authors: author_name language nationality | novels_written prizes_won | book_advance | born
bakeries: bakery_name head_baker district | loaves_a_day ovens | flour_cost | opened
banks: bank_name headquarters regulator | branches cash_machines | largest_loan | chartered
beaches: beach_name bay lifeguard | sand_length visitors | parking_fee | cleaned
bicycles: frame_maker colour rider | gears wheel_size | repair_bill | bought
boats: boat_name harbour skipper | hull_length crew_size | mooring_fee | launched
books: book_title publisher genre | pages copies_sold | list_price | published
bridges: bridge_name river engineer | span lanes | building_cost | completed
buses: route_name depot driver | seats stops | bus_fare | inspected
cameras: camera_model sensor lens_mount | megapixels battery_shots | shop_price | announced
cars: car_model manufacturer fuel | horsepower doors | rental_price | registered
castles: castle_name lord region | towers wall_height | entry_fee | restored
chefs: chef_name signature_dish kitchen | stars apprentices | menu_price | hired
cities: city_name mayor province | population tram_lines | city_budget | founded
climbers: climber_name home_wall sponsor | summits ropes_owned | sponsor_money | last_climb
companies: company_name director industry | employees offices | profit | listed
concerts: performer venue promoter | audience encores | stage_cost | performed
courses: course_title teacher faculty | credits enrolments | tuition | started
doctors: doctor_name clinic specialty | patients night_shifts | consultation_fee | certified
dogs: dog_name breed owner | dog_weight litters | vet_bill | adopted
elections: winner party county | votes turnout | campaign_cost | held_on
factories: plant_name product plant_town | machines workers | power_bill | built
farms: farmer crop valley | hectares tractors | harvest_income | sown
festivals: festival_name organiser square | tents bands | pass_price | first_day
films: film_title film_director leading_actor | running_time screens | box_office | premiered
flights: flight_code origin destination | passengers gate_number | fuel_cost | departed
games: game_title developer console | levels players_online | game_price | shipped
gardens: garden_name gardener flower | trees ponds | upkeep | planted
hospitals: hospital_name surgeon ward | beds ambulances | annual_grant | accredited
hotels: hotel_name manager street | rooms floors | nightly_rate | renovated
islands: island_name ocean governor | villages coast_length | ferry_price | surveyed
judges: judge_name court appointed_by | trials appeals | court_salary | sworn_in
lakes: lake_name basin nearest_town | depth fish_species | boat_hire | sampled
lawyers: lawyer_name firm bar | cases_won juniors | hourly_fee | admitted
libraries: library_name librarian quarter | volumes reading_desks | late_fine | catalogued
matches: home_team away_team stadium | goals yellow_cards | gate_money | played_on
museums: museum_name curator collection | galleries exhibits | museum_ticket | reopened
orders: order_code customer courier | items parcels | order_total | delivered
painters: painter_name movement patron | canvases shows | auction_record | died
phones: phone_name chip_maker phone_colour | screen_size storage | phone_price | unveiled
planes: plane_type plane_builder engine | wingspan cruise_speed | lease_rate | first_flown
players: player_name club position | caps shirt_number | wage | signed
ports: port_name harbour_master sea | cranes berths | port_dues | dredged
restaurants: restaurant_name owner_name cuisine | tables_indoors waiters | dinner_price | reviewed
roads: road_name maintainer junction | road_length bus_stops | toll | resurfaced
schools: school_name headteacher school_district | pupils classrooms | school_fee | inaugurated
ships: ship_name shipyard captain | tonnage decks | cruise_fare | commissioned
singers: stage_name band hometown | hits awards | concert_fee | debuted
songs: song_title composer album_name | chart_weeks verses | royalty | recorded
stadiums: stadium_name architect_firm tenant | stands capacity | naming_rights | unlocked
students: student_name major tutor | essays absences | scholarship | enrolled
teams: team_name coach league | wins losses | transfer_spend | promoted
trains: train_name operator terminus | carriages top_speed | seat_price | serviced
universities: university_name rector campus | lecturers degrees | endowment | granted
vineyards: vineyard_name grape winemaker | barrels slopes | bottle_price | harvested
volunteers: volunteer_name charity shelter | hours_given teams_led | travel_refund | joined
warehouses: warehouse_name keeper_firm goods | shelves forklifts | rent | leased
"""

TRAIN = """
aquariums: aquarist tank_type seaside_town | sharks litres_pumped | feeding_cost | water_changed
archives: archivist manuscript reading_room | boxes microfilms | copying_charge | deposited
balloons: balloonist envelope_pattern takeoff_field | burners altitude | basket_price | aired
beehives: beekeeper bee_strain meadow | frames honey_jars | honey_price | swarmed
canals: canal_name lock_builder feeder | locks towpath_length | barge_toll | navigable
carpets: weaver knot_style dye | knots_counted fringe_width | rug_value | woven
caves: cave_name explorer rock_type | chambers shaft_depth | guide_fee | mapped
choirs: conductor parish_hall anthem | sopranos rehearsals | robe_cost | last_sang
circuses: ringmaster tent_maker winter_camp | acrobats clowns | ringside_price | season_start
clocks: clockmaker movement_kind tower | chimes pendulum_length | winding_cost | last_wound
comets: discoverer observatory constellation | tail_length orbit_years | survey_funding | sighted
dairies: dairyman cheese cattle_breed | cows milk_litres | cheese_price | churned
dams: dam_name reservoir turbine_maker | spillways dam_height | concrete_cost | filled
dancers: dancer_name ballet troupe | rehearsal_hours encores_danced | costume_cost | auditioned
diamonds: cutter mine_name gem_shade | carats facets | appraisal | polished
dictionaries: lexicographer dialect editing_house | headwords editions | binding_cost | last_revised
expeditions: expedition_leader glacier base_camp | sledges days_out | grant_money | set_out
forges: blacksmith alloy hammer_kind | anvils swords_made | iron_cost | first_fired
fossils: palaeontologist era quarry | bone_count skull_width | lab_cost | excavated
fountains: sculptor_name plaza stone_kind | jets basin_width | plumbing_cost | switched_on
greenhouses: botanist orchid heating | panes seedlings | glass_cost | ventilated
inventions: inventor patent_office workshop | sketches prototypes | patent_fee | filed
kites: kite_maker fabric flying_beach | string_length ribbons | kit_price | test_flown
lanterns: lamplighter alley wick_kind | lumens brackets | oil_bill | lit_since
lighthouses: lamp_keeper lens_order headland | lamp_height steps | lighting_cost | first_lit
magicians: illusionist stage_partner favourite_trick | rabbits tricks | theatre_fee | initiated
markets: stall_holder spice arcade | stalls scales_tested | stall_rent | licence_expiry
mills: miller mill_stream grain_kind | millstones sacks_ground | sack_price | dressed
mines: foreman mineral shaft_name | galleries_dug carts | ore_price | reinforced
monasteries: abbot monastic_order hillside | monks scrolls | donation | consecrated
mountains: mountain_name massif first_climber | summit_height huts | permit_cost | first_ascended
mushrooms: forager mushroom_kind woodland | spores_counted baskets_picked | basket_worth | gathered
observatories: astronomer telescope_kind dome_maker | mirrors domes | mirror_price | first_light
operas: librettist tenor opera_house | acts chorus_size | box_seat_price | first_staged
orchards: orchardist apple_kind rootstock | rows_planted crates_filled | crate_price | pruned
parrots: parrot_name aviary feather_colour | words_known eggs_laid | cage_cost | hatched
pianos: piano_builder wood_kind pianist | keys_replaced strings_tuned | tuning_fee | voiced
potteries: potter glaze clay_pit | kilns vases_thrown | vase_price | glazed
prisons: prison_warden cell_block prison_county | cells escapes | bail_amount | locked_down
puppets: puppeteer puppet_theatre carved_from | joints_moved shows_given | marionette_price | carved
"""

VALID = """
quilts: quilter quilt_pattern guild_hall | patches stitches | batting_cost | exhibited
rockets: rocket_name propellant launch_pad | boosters payload_mass | mission_cost | lifted_off
saddles: saddler leather_kind stable_name | buckles stirrups | saddle_price | oiled
satellites: satellite_name antenna_maker orbit_kind | solar_panels transponders | insurance_premium | deorbited
sawmills: sawyer timber_kind forest_owner | blades planks_cut | plank_price | sharpened
shrines: shrine_name deity pilgrim_road | gates candles_burnt | candle_price | blessed
skaters: skater_name ice_rink jump_kind | medals spins | skate_cost | retired_on
submarines: submarine_name commander sonar_kind | torpedoes dive_depth | refit_cost | surfaced
"""

TEST = """
tapestries: tapestry_name loom_kind chamber_hung | threads_dyed panel_width | mending_cost | unrolled
telescopes: telescope_owner eyepiece mount_kind | focal_length magnification | tripod_price | aligned
temples: priest marble_kind sacred_hill | columns_standing altars | offering_value | dedicated
theatres: impresario playwright curtain_colour | balconies dressing_rooms | matinee_price | rewired
tournaments: champion chess_opening referee | rounds_played entrants | prize_purse | concluded
toymakers: toymaker_name toy_kind shop_lane | dolls trains_wound | toy_price | apprenticed
tramways: tram_builder gauge_kind depot_yard | trams_running overhead_wires | monthly_pass | electrified
treasures: treasure_hunter sunken_wreck chest_kind | coins_found goblets | reward | unearthed
tunnels: tunnel_name boring_machine mountain_pass | ventilators bore_length | lining_cost | broken_through
umbrellas: umbrella_maker handle_wood canopy_colour | ribs umbrellas_sold | handle_price | patented
violins: luthier varnish fiddler | bows_owned scroll_width | bow_price | restrung
volcanoes: volcano_name vulcanologist lava_kind | craters ash_height | sensor_cost | erupted
weathervanes: coppersmith figure_shown rooftop | arrows gilded_points | copper_cost | mounted
wells: well_digger aquifer village_green | buckets_drawn brick_rings | pump_price | last_tested
windmills: millwright sail_kind polder | sails cogs | sail_cost | braked
zoos: zookeeper rarest_animal pavilion | enclosures penguins | feed_bill | gates_opened
"""


def tables(topics: str) -> list[Table]:
    """Read the tables of one of the texts above, each with all of its columns.

    Example:
        >>> tables("farms: farmer crop | hectares | income | sown")[0].columns[2]
        Column(name='hectares', kind='number')
    """
    found = []
    for line in topics.strip().splitlines():
        name, columns = line.split(": ")
        names = (names.split() for names in columns.split(" | "))
        found.append(
            Table(name, tuple(Column(n, kind) for kind, group in zip(KINDS, names, strict=True) for n in group))
        )
    return found
